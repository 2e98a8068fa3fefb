{{- define "guard.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" }}
{{- end }}

{{/* KubeRay appends to this, and labels end at 63 characters. */}}
{{- define "guard.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else if contains (include "guard.name" .) .Release.Name }}
{{- .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "guard.name" .) | trunc 40 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{/* Of pods, too, whose app.kubernetes.io/name is KubeRay's: its services go by that. */}}
{{- define "guard.selectorLabels" -}}
app.kubernetes.io/part-of: {{ include "guard.name" . }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end }}

{{- define "guard.labels" -}}
app.kubernetes.io/name: {{ include "guard.name" . }}
{{ include "guard.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "guard.serviceName" -}}
{{- default (include "guard.fullname" .) .Values.service.name }}
{{- end }}

{{- define "guard.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "guard.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "guard.keysSecret" -}}
{{- if .Values.apiKeys.existingSecret }}
{{- .Values.apiKeys.existingSecret }}
{{- else if .Values.apiKeys.keys }}
{{- printf "%s-keys" (include "guard.fullname" .) }}
{{- end }}
{{- end }}

{{/* Context: (list root group); a group may have an image of its own, to which the common digest does not belong. */}}
{{- define "guard.image" -}}
{{- $root := index . 0 }}
{{- $own := default dict (index . 1).image }}
{{- $common := deepCopy $root.Values.image }}
{{- if or $own.tag $own.repository }}{{ $_ := unset $common "digest" }}{{ end }}
{{- $image := mergeOverwrite $common $own }}
{{- if $image.digest }}
{{- printf "%s@%s" $image.repository $image.digest }}
{{- else }}
{{- printf "%s:%s" $image.repository (default $root.Chart.AppVersion $image.tag) }}
{{- end }}
{{- end }}
