{{/* Environment of the server and of the migration before it. */}}
{{- define "dqo.mlflow.environment" -}}
{{- $mlflow := .Values.mlflow -}}
- name: HOME
  value: /tmp
- name: PYTHONUNBUFFERED
  value: "1"
- name: MLFLOW_DISABLE_TELEMETRY
  value: "true"
- name: MLFLOW_SERVER_ENABLE_JOB_EXECUTION
  value: "false"
{{- if eq $mlflow.database.kind "builtin" }}
- name: PGHOST
  value: $({{ include "dqo.serviceVariable" (dict "root" . "component" "postgresql" "what" "HOST") }})
- name: PGPORT
  value: "5432"
- name: PGDATABASE
  value: mlflow
- name: PGSSLMODE
  value: disable
{{- include "dqo.mlflow.databaseUser" (include "dqo.postgresql.secret" .) }}
{{- else if eq $mlflow.database.kind "external" }}
- name: PGHOST
  value: {{ $mlflow.database.host | quote }}
- name: PGPORT
  value: {{ $mlflow.database.port | quote }}
- name: PGDATABASE
  value: {{ $mlflow.database.name | quote }}
- name: PGSSLMODE
  value: {{ $mlflow.database.sslMode }}
{{- if $mlflow.database.caSecret }}
- name: PGSSLROOTCERT
  value: /etc/dqo/postgresql/ca.crt
{{- end }}
{{- include "dqo.mlflow.databaseUser" $mlflow.database.existingSecret }}
{{- end }}
{{- if eq $mlflow.artifacts.kind "builtin" }}
- name: MLFLOW_S3_ENDPOINT_URL
  value: http://$({{ include "dqo.serviceVariable" (dict "root" . "component" "seaweedfs" "what" "HOST") }}):8333
- name: AWS_DEFAULT_REGION
  value: us-east-1
{{- include "dqo.mlflow.artifactsUser" (include "dqo.seaweedfs.secret" .) }}
{{- else if eq $mlflow.artifacts.kind "s3" }}
{{- with $mlflow.artifacts.endpoint }}
- name: MLFLOW_S3_ENDPOINT_URL
  value: {{ . | quote }}
{{- end }}
- name: AWS_DEFAULT_REGION
  value: {{ $mlflow.artifacts.region | quote }}
{{- with $mlflow.artifacts.existingSecret }}
{{- include "dqo.mlflow.artifactsUser" . }}
{{- end }}
{{- end }}
{{- end }}

{{- define "dqo.mlflow.databaseUser" }}
- name: PGUSER
  valueFrom:
    secretKeyRef: {name: {{ . }}, key: username}
- name: PGPASSWORD
  valueFrom:
    secretKeyRef: {name: {{ . }}, key: password}
{{- end }}

{{- define "dqo.mlflow.artifactsUser" }}
- name: AWS_ACCESS_KEY_ID
  valueFrom:
    secretKeyRef: {name: {{ . }}, key: access-key-id}
- name: AWS_SECRET_ACCESS_KEY
  valueFrom:
    secretKeyRef: {name: {{ . }}, key: secret-access-key}
{{- end }}

{{- define "dqo.mlflow.mounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: config, mountPath: /etc/dqo/mlflow, readOnly: true}
{{- if not (include "dqo.mlflow.stateless" .) }}
- {name: data, mountPath: /data}
{{- end }}
{{- if .Values.mlflow.database.caSecret }}
- {name: postgresql-ca, mountPath: /etc/dqo/postgresql, readOnly: true}
{{- end }}
{{- end }}
