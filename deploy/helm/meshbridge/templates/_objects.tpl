{{/*
The objects are those of deploy/kustomize/base, read from files/, so that the two cannot drift apart. What values say is set
in them here.
*/}}

{{- define "meshbridge.image" -}}
{{- $image := .Values.image -}}
{{- if $image.digest }}{{ $image.repository }}@{{ $image.digest }}
{{- else }}{{ $image.repository }}:{{ $image.tag | default .Chart.AppVersion }}{{ end -}}
{{- end }}

{{/* All objects of a file of the base that values want. */}}
{{- define "meshbridge.file" -}}
{{- $root := .root -}}
{{- range $text := regexSplit "(?m)^---$" ($root.Files.Get (printf "files/base/%s" .file)) -1 }}
{{- $object := fromYaml $text }}
{{- if and $object.kind (eq (include "meshbridge.wanted" (dict "root" $root "object" $object)) "true") }}
{{- include "meshbridge.set" (dict "root" $root "object" $object) }}
---
{{ toYaml $object }}
{{- end }}
{{- end }}
{{- end }}

{{- define "meshbridge.wanted" -}}
{{- $values := .root.Values -}}
{{- $component := index (.object.metadata.labels | default dict) "app.kubernetes.io/component" | default "" -}}
{{- if eq .object.kind "Namespace" }}{{ $values.namespace.create }}
{{- else if eq .object.kind "NetworkPolicy" }}{{ $values.networkPolicy.enabled }}
{{- else if eq .object.kind "PodDisruptionBudget" }}{{ $values.podDisruptionBudget.enabled }}
{{- else if and (eq .object.kind "DaemonSet") (eq $component "agent") }}{{ eq $values.enforcer "ebpf" }}
{{- else }}true{{ end -}}
{{- end }}

{{- define "meshbridge.set" -}}
{{- $object := .object -}}
{{- $values := .root.Values -}}
{{- $component := index ($object.metadata.labels | default dict) "app.kubernetes.io/component" | default "" -}}
{{- if has $object.kind (list "Deployment" "DaemonSet") }}
{{- $own := index $values $component }}
{{- $pod := $object.spec.template.spec }}
{{- if eq $object.kind "Deployment" }}{{ $_ := set $object.spec "replicas" $own.replicas }}{{ end }}
{{- $_ := set $pod "nodeSelector" $own.nodeSelector }}
{{- $_ := set $pod "tolerations" $own.tolerations }}
{{- $_ := set $pod "priorityClassName" $own.priorityClassName }}
{{- if $values.image.pullSecrets }}
{{- $secrets := list }}{{ range $values.image.pullSecrets }}{{ $secrets = append $secrets (dict "name" .) }}{{ end }}
{{- $_ := set $pod "imagePullSecrets" $secrets }}
{{- end }}
{{- $_ := set $object.spec.template.metadata "annotations" (merge (dict) $object.spec.template.metadata.annotations $own.podAnnotations) }}
{{- range $container := $pod.containers }}
{{- $_ := set $container "image" (include "meshbridge.image" $.root) }}
{{- $_ := set $container "imagePullPolicy" $values.image.pullPolicy }}
{{- $_ := set $container "resources" $own.resources }}
{{- $args := $container.args }}
{{- if and (has $component (list "controller" "webhook")) (ne $values.istioNamespace "istio-system") }}
{{- $args = append $args (printf "--istio-namespace=%s" $values.istioNamespace) }}
{{- end }}
{{- if and (eq $component "webhook") $own.denyRefused }}{{ $args = append $args "--deny-refused" }}{{ end }}
{{- $_ := set $container "args" (concat $args $own.extraArgs) }}
{{- end }}
{{- if eq $component "agent" }}
{{- $_ := set $object.spec.updateStrategy.rollingUpdate "maxUnavailable" $own.maxUnavailable }}
{{- range $volume := $pod.volumes }}
{{- if eq $volume.name "cni-bin" }}{{ $_ := set $volume.hostPath "path" $own.cni.binDir }}{{ end }}
{{- if eq $volume.name "cni-conf" }}{{ $_ := set $volume.hostPath "path" $own.cni.confDir }}{{ end }}
{{- end }}
{{- end }}
{{- else if and (eq $object.kind "NetworkPolicy") (eq $component "webhook") }}
{{- $ports := list }}
{{- range $values.networkPolicy.apiServerPorts }}{{ $ports = append $ports (dict "port" (int .) "protocol" "TCP") }}{{ end }}
{{- $_ := set $object.spec "egress" (list (dict "ports" $ports)) }}
{{- end }}
{{- end }}
