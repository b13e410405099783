{{/* Names and labels. */}}

{{- define "dqo.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- $full := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) -}}
{{- default $full .Values.fullnameOverride | replace "." "-" | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{/* Labels that selectors use and that never change. Call: (dict "root" $ "component" "mlflow") */}}
{{- define "dqo.selectorLabels" -}}
app.kubernetes.io/name: {{ default .root.Chart.Name .root.Values.nameOverride | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
{{- with .component }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- end }}

{{/* Labels of an object. Call: (dict "root" $ "component" "mlflow"), the component may be left out */}}
{{- define "dqo.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" | trunc 63 }}
{{ include "dqo.selectorLabels" . }}
app.kubernetes.io/part-of: dqo-pipelines
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
{{- range $key, $value := .root.Values.commonLabels }}
{{ $key }}: {{ $value | quote }}
{{- end }}
{{- end }}

{{/* Labels of a pod: none that a new version of the chart changes, or every upgrade would restart it. */}}
{{- define "dqo.podLabels" -}}
{{ include "dqo.selectorLabels" . }}
app.kubernetes.io/part-of: dqo-pipelines
{{- range $key, $value := .root.Values.commonLabels }}
{{ $key }}: {{ $value | quote }}
{{- end }}
{{- end }}

{{/* Image reference; a digest wins over a tag. Call: (dict "root" $ "image" .Values.mlflow.image) */}}
{{- define "dqo.image" -}}
{{- $repository := .image.repository -}}
{{- with .root.Values.imageRegistry }}{{ $repository = printf "%s/%s" (trimSuffix "/" .) $repository }}{{ end -}}
{{- if .image.digest }}{{ printf "%s@%s" $repository .image.digest }}{{ else }}{{ printf "%s:%s" $repository .image.tag }}{{ end -}}
{{- end }}

{{- define "dqo.pullSecrets" -}}
{{- with .Values.imagePullSecrets -}}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}

{{/* Restricted Pod Security. Call: (dict "user" 10001) */}}
{{- define "dqo.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ .user }}
runAsGroup: {{ .user }}
fsGroup: {{ .user }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "dqo.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* Name of the variable that Kubernetes gives every pod of the namespace with a Service's address.
     Call: (dict "root" $ "component" "mlflow" "what" "HOST") */}}
{{- define "dqo.serviceVariable" -}}
{{- printf "%s_%s_SERVICE_%s" (include "dqo.fullname" .root) .component .what | upper | replace "-" "_" -}}
{{- end }}

{{- define "dqo.mlflow.name" -}}{{ include "dqo.fullname" . }}-mlflow{{- end }}
{{- define "dqo.postgresql.name" -}}{{ include "dqo.fullname" . }}-postgresql{{- end }}
{{- define "dqo.seaweedfs.name" -}}{{ include "dqo.fullname" . }}-seaweedfs{{- end }}
{{- define "dqo.judge.name" -}}{{ include "dqo.fullname" . }}-judge{{- end }}
{{- define "dqo.runner.name" -}}
{{- default (printf "%s-runner" (include "dqo.fullname" .)) .Values.runner.serviceAccount.name -}}
{{- end }}

{{/* Who gets the runner's rights. */}}
{{- define "dqo.runner.subjects" -}}
{{- if or .Values.runner.serviceAccount.create .Values.runner.serviceAccount.name }}
- kind: ServiceAccount
  name: {{ include "dqo.runner.name" . }}
  namespace: {{ .Release.Namespace }}
{{- end }}
{{- range .Values.runner.subjects }}
- kind: ServiceAccount
  name: {{ .name }}
  namespace: {{ .namespace }}
{{- end }}
{{- end }}

{{/* MLflow's address for pipelines and training pods. */}}
{{- define "dqo.trackingUri" -}}
{{- if .Values.tracking.uri -}}
{{ .Values.tracking.uri }}
{{- else -}}
{{ printf "http://%s.%s.svc:%v" (include "dqo.mlflow.name" .) .Release.Namespace .Values.mlflow.service.port }}
{{- end -}}
{{- end }}

{{/* Whether several MLflow servers may run at once: nothing is kept in the pod. Empty is no. */}}
{{- define "dqo.mlflow.stateless" -}}
{{- if and (ne .Values.mlflow.database.kind "sqlite") (ne .Values.mlflow.artifacts.kind "local") }}true{{ end -}}
{{- end }}

{{- define "dqo.mlflow.databaseUri" -}}
{{- /* libpq takes host, user and password from the PG* variables, so no password stands in an address. */ -}}
{{- ternary "sqlite:////data/mlflow.db" "postgresql+psycopg2://" (eq .Values.mlflow.database.kind "sqlite") -}}
{{- end }}

{{- define "dqo.mlflow.authUri" -}}
{{- ternary "sqlite:////data/auth.db" "postgresql+psycopg2://" (eq .Values.mlflow.database.kind "sqlite") -}}
{{- end }}

{{- define "dqo.mlflow.artifacts" -}}
{{- $artifacts := .Values.mlflow.artifacts -}}
{{- if eq $artifacts.kind "local" -}}
/data/artifacts
{{- else -}}
{{ printf "s3://%s/%s" (include "dqo.mlflow.bucket" .) $artifacts.prefix | trimSuffix "/" }}
{{- end -}}
{{- end }}

{{- define "dqo.mlflow.bucket" -}}
{{- ternary "mlflow" .Values.mlflow.artifacts.bucket (eq .Values.mlflow.artifacts.kind "builtin") -}}
{{- end }}

{{- define "dqo.postgresql.secret" -}}
{{- default (include "dqo.postgresql.name" .) .Values.postgresql.existingSecret -}}
{{- end }}

{{- define "dqo.seaweedfs.secret" -}}
{{- default (include "dqo.seaweedfs.name" .) .Values.seaweedfs.existingSecret -}}
{{- end }}

{{/* Host headers that MLflow accepts: its check compares them whole, so each stands with and without the port. The
     address of the Service comes from the variable that Kubernetes sets, so clients may also use it where the cluster
     has no DNS. The node's address comes with any port: a NodePort's, or the API server's, whose proxy passes it on. */}}
{{- define "dqo.mlflow.allowedHosts" -}}
{{- $mlflow := .Values.mlflow -}}
{{- $name := include "dqo.mlflow.name" . -}}
{{- $hosts := list -}}
{{- $address := printf "$(%s)" (include "dqo.serviceVariable" (dict "root" . "component" "mlflow" "what" "HOST")) -}}
{{- $names := list $name (printf "%s.%s" $name .Release.Namespace) (printf "%s.%s.svc" $name .Release.Namespace) -}}
{{- $names = append $names (printf "%s.%s.svc.cluster.local" $name .Release.Namespace) -}}
{{- range concat $names (list $address "$(POD_IP)") -}}
{{- $hosts = concat $hosts (list . (printf "%s:%v" . $mlflow.service.port)) -}}
{{- end -}}
{{- if ne (int $mlflow.service.port) 5000 }}{{ $hosts = append $hosts "$(POD_IP):5000" }}{{ end -}}
{{- $hosts = concat $hosts (list "$(HOST_IP):*" "localhost" "localhost:*" "127.0.0.1" "127.0.0.1:*") -}}
{{- if $mlflow.ingress.enabled }}{{ $hosts = append $hosts $mlflow.ingress.host }}{{ end -}}
{{- concat $hosts $mlflow.allowedHosts | uniq | join "," -}}
{{- end }}

{{/* Browser pages that may write: the published one and those that were named. */}}
{{- define "dqo.mlflow.corsOrigins" -}}
{{- $ingress := .Values.mlflow.ingress -}}
{{- $origins := .Values.mlflow.corsAllowedOrigins -}}
{{- if $ingress.enabled -}}
{{- $origins = prepend $origins (printf "%s://%s" (ternary "https" "http" (ne $ingress.tlsSecret "")) $ingress.host) -}}
{{- end -}}
{{- $origins | uniq | join "," -}}
{{- end }}

{{/* Claim of a section with `existingClaim`. Call: (dict "root" $ "section" .Values.modelCache "suffix" "model-cache") */}}
{{- define "dqo.claimName" -}}
{{- default (printf "%s-%s" (include "dqo.fullname" .root) .suffix) .section.existingClaim -}}
{{- end }}

{{/* A claim that outlives the release. Call: (dict "root" $ "section" ... "suffix" ... "component" ...) */}}
{{- define "dqo.claim" -}}
apiVersion: v1
kind: PersistentVolumeClaim
metadata:
  name: {{ include "dqo.claimName" . }}
  namespace: {{ .root.Release.Namespace }}
  labels:
    {{- include "dqo.labels" . | nindent 4 }}
  annotations:
    helm.sh/resource-policy: keep
spec:
  accessModes: [{{ default "ReadWriteOnce" .section.accessMode }}]
  {{- with .section.storageClass }}
  storageClassName: {{ . | quote }}
  {{- end }}
  resources:
    requests:
      storage: {{ .section.size }}
{{- end }}

{{/* Whether to render objects of a kind that a cluster may not know. Empty is no.
     Call: (dict "root" $ "install" "auto" "api" "group/version/Kind") */}}
{{- define "dqo.wanted" -}}
{{- if or (eq .install "always") (and (eq .install "auto") (.root.Capabilities.APIVersions.Has .api)) }}true{{ end -}}
{{- end }}

{{/* Folders that Python libraries and vLLM write to, where the file system is read-only. */}}
{{- define "dqo.modelEnvironment" -}}
- name: HOME
  value: /tmp
- name: HF_HOME
  value: {{ ternary "/models/huggingface" "/tmp/huggingface" .Values.modelCache.enabled }}
{{- if .Values.offline }}
- name: HF_HUB_OFFLINE
  value: "1"
{{- end }}
{{- end }}

{{/*
Put this installation into a compiled pipeline: image, user, registry credentials and, where its tasks run in the
release's namespace, volumes and the MLflow user. Claims and Secrets that the recipe names stay. Changes `spec`, writes nothing.
Call: (dict "root" $ "spec" <spec of a PipelineVersion> "image" <reference> "here" <bool>)
*/}}
{{- define "dqo.placed" -}}
{{- $v := .root.Values -}}
{{- $mounts := dict -}}
{{- $variables := dict -}}
{{- if .here -}}
  {{- if $v.workspace.enabled -}}
    {{- $_ := set $mounts "/workspace" (include "dqo.claimName" (dict "root" .root "section" $v.workspace "suffix" "workspace")) -}}
    {{- $_ := set $variables "XDG_CACHE_HOME" "/workspace/cache" -}}
  {{- end -}}
  {{- if $v.modelCache.enabled -}}
    {{- $_ := set $mounts "/models" (include "dqo.claimName" (dict "root" .root "section" $v.modelCache "suffix" "model-cache")) -}}
    {{- $_ := set $variables "HF_HOME" "/models/huggingface" -}}
  {{- end -}}
{{- end -}}
{{- if $v.offline }}{{ $_ := set $variables "HF_HUB_OFFLINE" "1" }}{{ end -}}
{{- range .spec.pipelineSpec.deploymentSpec.executors -}}
  {{- $_ := set .container "image" $.image -}}
  {{- $env := dict -}}
  {{- range .container.env }}{{ $_ := set $env .name .value }}{{ end -}}
  {{- $list := list -}}
  {{- range $name, $value := merge (dict) $variables $env -}}
    {{- $list = append $list (dict "name" $name "value" $value) -}}
  {{- end -}}
  {{- $_ := set .container "env" $list -}}
{{- end -}}
{{- range .spec.platformSpec.platforms.kubernetes.deploymentSpec.executors -}}
  {{- $_ := set . "imagePullPolicy" $v.trainer.image.pullPolicy -}}
  {{- $user := toString $v.podSecurity.runAsUser -}}
  {{- $_ := set . "securityContext" (dict "runAsUser" $user "runAsGroup" $user "runAsNonRoot" true) -}}
  {{- $pull := default list .imagePullSecret -}}
  {{- range $v.imagePullSecrets -}}
    {{- $pull = append $pull (dict "secretName" . "secretNameParameter" (dict "runtimeValue" (dict "constant" .))) -}}
  {{- end -}}
  {{- if $pull }}{{ $_ := set . "imagePullSecret" $pull }}{{ end -}}
  {{- $claims := default list .pvcMount -}}
  {{- $taken := list -}}
  {{- range $claims }}{{ $taken = append $taken .mountPath }}{{ end -}}
  {{- range $path, $claim := $mounts -}}
    {{- if not (has $path $taken) -}}
      {{- $claims = append $claims (dict "constant" $claim "mountPath" $path "pvcNameParameter" (dict "runtimeValue" (dict "constant" $claim))) -}}
    {{- end -}}
  {{- end -}}
  {{- if $claims }}{{ $_ := set . "pvcMount" $claims }}{{ end -}}
  {{- $secrets := default list .secretAsEnv -}}
  {{- if and $.here $v.tracking.existingSecret (not (contains "MLFLOW_TRACKING_PASSWORD" (toJson $secrets))) -}}
    {{- $keys := list (dict "secretKey" "username" "envVar" "MLFLOW_TRACKING_USERNAME") (dict "secretKey" "password" "envVar" "MLFLOW_TRACKING_PASSWORD") -}}
    {{- $secrets = append $secrets (dict "secretName" $v.tracking.existingSecret "secretNameParameter" (dict "runtimeValue" (dict "constant" $v.tracking.existingSecret)) "keyToEnv" $keys "optional" true) -}}
  {{- end -}}
  {{- if $secrets }}{{ $_ := set . "secretAsEnv" $secrets }}{{ end -}}
{{- end -}}
{{- end }}

{{/* A file of the chart as the value of a ConfigMap's key. Call: (dict "root" $ "path" "files/...") */}}
{{- define "dqo.file" -}}
{{- .root.Files.Get .path | trim | nindent 4 | replace "\n    \n" "\n\n" | replace "\n    \n" "\n\n" -}}
{{- end }}

{{/* Pods that may call MLflow and the judge, as NetworkPolicyPeers. */}}
{{- define "dqo.clients" -}}
- podSelector:
    matchLabels:
      pipelines.kubeflow.org/v2_component: "true"
- podSelector:
    matchExpressions:
      - {key: jobset.sigs.k8s.io/jobset-name, operator: Exists}
{{- range .Values.networkPolicy.clientNamespaces }}
- namespaceSelector:
    matchLabels:
      kubernetes.io/metadata.name: {{ . }}
{{- end }}
{{- with .Values.networkPolicy.clients }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "dqo.dnsRule" -}}
{{- with .Values.networkPolicy.dns }}
- to:
    {{- toYaml . | nindent 4 }}
  ports:
    - {protocol: UDP, port: 53}
    - {protocol: TCP, port: 53}
{{- end }}
{{- end }}
