{{/* serveConfigV2: the configuration file. What may change while a model serves stands in user_config, where Ray Serve
     lets it, the rest in args. */}}
{{- define "guard.serveConfig" -}}
{{- $live := list "mode" "threshold" "expose_scores" "on_failure" "sample" "artifact" "version" "revision" }}
{{- $guard := deepCopy .Values.guard }}
{{- $shared := dict "metrics_dir" "/tmp/guard-metrics" }}
{{- with include "guard.keysSecret" . }}
{{- $_ := set $shared "keys" (dict "file" "/etc/guard/keys" "environment" false) }}
{{- end }}
{{- $args := mergeOverwrite $shared $guard }}
{{- if .Values.grpc.enabled }}
{{- $_ := set $args "grpc" (dict "host" "0.0.0.0" "port" .Values.grpc.port) }}
{{- end }}
{{- $models := list }}
{{- $userConfig := dict }}
{{- range $args.models }}
{{- $name := default (base .artifact) .name }}
{{- if hasKey $userConfig $name }}
{{- fail (printf "guard.models: two are named %s: give one of them another name" $name) }}
{{- end }}
{{- $fixed := dict "name" $name }}
{{- $changing := dict }}
{{- range $key, $value := . }}
{{- if has $key $live }}{{ $_ := set $changing $key $value }}{{ else }}{{ $_ := set $fixed $key $value }}{{ end }}
{{- end }}
{{- $models = append $models $fixed }}
{{- $_ := set $userConfig $name $changing }}
{{- end }}
{{- $_ := set $args "models" $models }}
{{- $deployment := dict "name" "classifier" "user_config" $userConfig }}
{{- with .Values.autoscaling }}
{{- if .enabled }}
{{- $_ := unset $args "replicas" }}
{{- $_ := set $deployment "num_replicas" nil }}
{{- $_ := set $deployment "autoscaling_config" (dict "min_replicas" .minReplicas "max_replicas" .maxReplicas "target_ongoing_requests" .targetOngoingRequests) }}
{{- end }}
{{- end }}
{{- $metrics := pick $args "metrics_dir" "keys" }}
proxy_location: EveryNode
http_options:
  host: 0.0.0.0
  port: 8000
applications:
  - name: guard
    route_prefix: /
    import_path: deployments.app:build
    args: {{- toYaml $args | nindent 6 }}
    deployments: {{- toYaml (list $deployment) | nindent 6 }}
  - name: guard-metrics
    route_prefix: /metrics
    import_path: deployments.app:build_metrics
    args: {{- toYaml $metrics | nindent 6 }}
{{- end }}
