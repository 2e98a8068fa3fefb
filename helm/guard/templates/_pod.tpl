{{/* A pod of the head or of a group of workers. Context: (dict "root" $ "group" values "role" head|worker). */}}
{{- define "guard.podTemplate" -}}
{{- $root := .root }}
{{- $values := $root.Values }}
{{- $head := eq .role "head" }}
{{- $keys := include "guard.keysSecret" $root }}
metadata:
  labels:
    {{- include "guard.selectorLabels" $root | nindent 4 }}
    app.kubernetes.io/component: {{ .role }}
    {{- with $values.podLabels }}{{ toYaml . | nindent 4 }}{{ end }}
  {{- with $values.podAnnotations }}
  annotations: {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ include "guard.serviceAccountName" $root | quote }}
  automountServiceAccountToken: {{ and $head $values.autoscaling.enabled }}
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ $values.terminationGracePeriodSeconds }}
  {{- with $values.priorityClassName }}
  priorityClassName: {{ . | quote }}
  {{- end }}
  {{- with $values.image.pullSecrets }}
  imagePullSecrets: {{- toYaml . | nindent 4 }}
  {{- end }}
  securityContext: {{- toYaml $values.podSecurityContext | nindent 4 }}
  {{- with .group.nodeSelector }}
  nodeSelector: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .group.tolerations }}
  tolerations: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .group.affinity }}
  affinity: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if not $head }}
  topologySpreadConstraints:
    {{- with .group.topologySpreadConstraints }}
    {{- toYaml . | nindent 4 }}
    {{- else }}
    - maxSkew: 1
      topologyKey: kubernetes.io/hostname
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels:
          {{- include "guard.selectorLabels" $root | nindent 10 }}
          app.kubernetes.io/component: worker
    {{- end }}
  {{- end }}
  {{- with $values.artifacts.objectStore }}
  {{- if and .source (not $head) }}
  initContainers:
    - name: artifacts
      image: {{ .image }}
      args: [copy, --verbose, {{ .source | quote }}, /artifacts]
      {{- with .secret }}
      envFrom:
        - secretRef: {name: {{ . | quote }}}
      {{- end }}
      env:
        - {name: HOME, value: /tmp}
      securityContext: {{- toYaml $values.securityContext | nindent 8 }}
      resources:
        requests: {cpu: 100m, memory: 256Mi}
        limits: {cpu: "1", memory: 256Mi}
      volumeMounts:
        - {name: artifacts, mountPath: /artifacts}
        - {name: tmp, mountPath: /tmp}
  {{- end }}
  {{- end }}
  containers:
    - name: ray-{{ .role }}
      image: {{ include "guard.image" (list $root .group) }}
      imagePullPolicy: {{ default $values.image.pullPolicy (dig "image" "pullPolicy" "" .group) }}
      securityContext: {{- toYaml $values.securityContext | nindent 8 }}
      resources: {{- toYaml .group.resources | nindent 8 }}
      env:
        - {name: HOME, value: /tmp}
        - {name: RAY_USAGE_STATS_ENABLED, value: "0"}
        - {name: RAY_SERVE_ENABLE_HA_PROXY, value: "1"}
        - {name: RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S, value: "30"}
        {{- if eq $values.rayAuth "disabled" }}
        - {name: RAY_AUTH_MODE, value: disabled}
        {{- end }}
        {{- with $values.env }}{{ toYaml . | nindent 8 }}{{ end }}
      {{- with $values.envFrom }}
      envFrom: {{- toYaml . | nindent 8 }}
      {{- end }}
      ports:
        - {name: serve, containerPort: 8000}
        {{- if $values.grpc.enabled }}
        - {name: grpc, containerPort: {{ $values.grpc.port }}}
        {{- end }}
        {{- if $head }}
        - {name: gcs-server, containerPort: 6379}
        - {name: dashboard, containerPort: 8265}
        - {name: client, containerPort: 10001}
        {{- end }}
      startupProbe:
        httpGet: {path: /api/local_raylet_healthz, port: 52365}
        periodSeconds: 2
        failureThreshold: 60
      livenessProbe:
        httpGet: {path: /api/local_raylet_healthz, port: 52365}
        periodSeconds: 5
        timeoutSeconds: 5
        failureThreshold: 24
      readinessProbe:
        {{- if $head }}
        httpGet: {path: /api/gcs_healthz, port: 8265}
        {{- else }}
        httpGet: {path: /-/healthz, port: 8000}
        {{- end }}
        periodSeconds: 5
        timeoutSeconds: 5
        failureThreshold: {{ ternary 10 1 $head }}
      {{- if not $head }}
      lifecycle:
        preStop:
          exec: {command: [sh, -c, "sleep {{ $values.drainSeconds }}; ray stop"]}
      {{- end }}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        - {name: shm, mountPath: /dev/shm}
        - {name: artifacts, mountPath: /artifacts, readOnly: true}
        {{- if $keys }}
        - {name: keys, mountPath: /etc/guard, readOnly: true}
        {{- end }}
  volumes:
    - name: tmp
      emptyDir: {sizeLimit: {{ $values.scratch.tmp }}}
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: {{ $values.scratch.shm }}}
    {{- if and $head $values.autoscaling.enabled }}
    - name: ray-logs # KubeRay mounts it at /tmp/ray of the head and of its autoscaler, or makes one without a bound
      emptyDir: {sizeLimit: {{ $values.scratch.tmp }}}
    {{- end }}
    - name: artifacts
      {{- if $values.artifacts.volume }}
      {{- toYaml $values.artifacts.volume | nindent 6 }}
      {{- else if $values.artifacts.image.reference }}
      image: {reference: {{ $values.artifacts.image.reference }}, pullPolicy: {{ $values.artifacts.image.pullPolicy }}}
      {{- else }}
      emptyDir: {sizeLimit: {{ $values.artifacts.objectStore.sizeLimit }}}
      {{- end }}
    {{- if $keys }}
    - name: keys
      secret: {secretName: {{ $keys | quote }}, defaultMode: 0440}
    {{- end }}
{{- end }}
