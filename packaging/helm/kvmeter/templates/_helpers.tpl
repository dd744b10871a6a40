{{- define "kvmeter.labels" -}}
app.kubernetes.io/name: kvmeter
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .part }}
{{- end }}

{{- define "kvmeter.image" -}}
{{ with .root.Values.image.registry }}{{ . }}/{{ end }}{{ .program }}:{{ .root.Values.image.tag | default .root.Chart.AppVersion }}
{{- end }}

{{- define "kvmeter.secret" -}}
{{ .Values.existingSecret | default (printf "%s-kvmeter" .Release.Name) }}
{{- end }}

{{- /* The broker's URL, as every program reads it. */ -}}
{{- define "kvmeter.amqp" -}}
- name: KVMETER_AMQP__URL
  valueFrom: {secretKeyRef: {name: {{ include "kvmeter.secret" . }}, key: amqp-url}}
{{- end }}

{{- /* A pod starts anew when what it reads at its start has changed. */ -}}
{{- define "kvmeter.checksum" -}}
checksum/config: {{ include (print .root.Template.BasePath "/config.yaml") .root | sha256sum }}
{{- end }}

{{- define "kvmeter.pod" -}}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- with .values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- /* Who needs no right at all. */ -}}
{{- define "kvmeter.unprivileged" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- /* The names under which notifiers sign: those of their pods. */ -}}
{{- define "kvmeter.notifiers" -}}
{{- $names := list }}
{{- range until (int .Values.notifier.replicas) }}
{{- $names = append $names (printf "kvmeter-notifier-%d" .) }}
{{- end }}
{{- toJson $names }}
{{- end }}
