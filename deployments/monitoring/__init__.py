"""What watches the guard from outside: rules and dashboards, without code of the serving path."""
