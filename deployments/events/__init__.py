"""What is told and kept of flagged requests, beside their answers: events for administrators, and a quarantine.

Requests hand over what is known and go on. Threads of their own write it out, from bounded queues: what does not fit is
dropped and counted, and what fails is counted, logged, and nobody's answer.
"""
