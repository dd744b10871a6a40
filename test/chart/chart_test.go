// Package chart renders the chart in packaging/helm as Helm does, and holds what
// comes out against the types of Kubernetes and the settings that the programs take.
package chart

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"helm.sh/helm/v4/pkg/chart/common"
	"helm.sh/helm/v4/pkg/chart/common/util"
	"helm.sh/helm/v4/pkg/chart/v2/lint"
	"helm.sh/helm/v4/pkg/chart/v2/loader"
	"helm.sh/helm/v4/pkg/engine"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"
)

const folder = "../../packaging/helm/kvmeter"

// manifests are what a chart makes, by kind and name.
type manifests map[string]any

func (m manifests) add(t *testing.T, text []byte) {
	t.Helper()
	var head struct {
		Kind     string
		Metadata struct{ Name string }
	}
	if err := yaml.Unmarshal(text, &head); err != nil {
		t.Fatalf("%v:\n%s", err, text)
	}
	into := map[string]any{
		"ConfigMap": new(corev1.ConfigMap), "Secret": new(corev1.Secret), "Service": new(corev1.Service),
		"StatefulSet": new(appsv1.StatefulSet), "DaemonSet": new(appsv1.DaemonSet),
	}[head.Kind]
	if into == nil {
		t.Fatalf("nobody expects a %s:\n%s", head.Kind, text)
	}
	if err := yaml.UnmarshalStrict(text, into); err != nil {
		t.Errorf("%s %s: %v:\n%s", head.Kind, head.Metadata.Name, err, text)
	}
	m[head.Kind+" "+head.Metadata.Name] = into
}

func render(values map[string]any) (map[string]string, error) {
	chart, err := loader.LoadDir(folder)
	if err != nil {
		return nil, err
	}
	all, err := util.ToRenderValues(chart, values, common.ReleaseOptions{Name: "site", Namespace: "telemetry", IsInstall: true}, common.DefaultCapabilities)
	if err != nil {
		return nil, err
	}
	return engine.Render(chart, all)
}

// least is what must be said.
func least() map[string]any {
	return map[string]any{
		"amqpURL": "amqp://kvmeter:secret@rabbit:5672/kvmeter",
		"keys":    map[string]any{"compute-1": strings.Repeat("1", 16), "kvmeter-notifier-0": strings.Repeat("2", 16)},
	}
}

func rendered(t *testing.T, values map[string]any) manifests {
	t.Helper()
	files, err := render(values)
	if err != nil {
		t.Fatal(err)
	}
	all := manifests{}
	for name, text := range files {
		if filepath.Ext(name) != ".yaml" {
			continue
		}
		for doc := range bytes.SplitSeq([]byte(text), []byte("\n---\n")) {
			if len(bytes.TrimSpace(doc)) > 0 {
				all.add(t, doc)
			}
		}
	}
	return all
}

func TestHelmFindsNoFault(t *testing.T) {
	for _, m := range lint.RunAll(folder, least(), "telemetry").Messages {
		if !strings.Contains(m.Err.Error(), "icon is recommended") {
			t.Error(m)
		}
	}
}

func TestAChartIsWhatKubernetesTakes(t *testing.T) {
	all := rendered(t, least())
	for _, want := range []string{
		"Secret site-kvmeter", "ConfigMap site-kvmeter-central", "ConfigMap site-kvmeter-notifier", "ConfigMap site-kvmeter-agent",
		"StatefulSet kvmeter-central", "StatefulSet kvmeter-notifier", "DaemonSet site-kvmeter-agent", "Service kvmeter-central", "Service kvmeter-notifier",
	} {
		if all[want] == nil {
			t.Errorf("there is no %s", want)
		}
	}
	// What pods mount and read is there.
	for name, template := range map[string]corev1.PodTemplateSpec{
		"central":  all["StatefulSet kvmeter-central"].(*appsv1.StatefulSet).Spec.Template,
		"notifier": all["StatefulSet kvmeter-notifier"].(*appsv1.StatefulSet).Spec.Template,
		"agent":    all["DaemonSet site-kvmeter-agent"].(*appsv1.DaemonSet).Spec.Template,
	} {
		for _, v := range template.Spec.Volumes {
			if v.ConfigMap != nil && all["ConfigMap "+v.ConfigMap.Name] == nil {
				t.Errorf("%s mounts %s, which is not there", name, v.ConfigMap.Name)
			}
			if v.Secret != nil && all["Secret "+v.Secret.SecretName] == nil {
				t.Errorf("%s mounts %s, which is not there", name, v.Secret.SecretName)
			}
		}
		volumes := template.Spec.Volumes
		for _, c := range all.claims(name) {
			volumes = append(volumes, corev1.Volume{Name: c})
		}
		for _, m := range template.Spec.Containers[0].VolumeMounts {
			if !slices.ContainsFunc(volumes, func(v corev1.Volume) bool { return v.Name == m.Name }) {
				t.Errorf("%s mounts %s, which is no volume", name, m.Name)
			}
		}
	}
	if got, want := all["DaemonSet site-kvmeter-agent"].(*appsv1.DaemonSet).Spec.Template.Spec.Containers[0].SecurityContext.Capabilities.Add,
		[]corev1.Capability{"BPF", "PERFMON", "NET_ADMIN"}; !slices.Equal(got, want) {
		t.Errorf("the agent has the capabilities %v, want %v", got, want)
	}
}

func (m manifests) claims(part string) (names []string) {
	if set, ok := m["StatefulSet kvmeter-"+part].(*appsv1.StatefulSet); ok {
		for _, c := range set.Spec.VolumeClaimTemplates {
			names = append(names, c.Name)
		}
	}
	return names
}

func TestProgramsTakeTheirSettings(t *testing.T) {
	bin := t.TempDir()
	build := exec.Command("go", "build", "-o", bin+"/", "./cmd/...")
	build.Dir = "../.."
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	values := least()
	values["central"] = map[string]any{"settings": map[string]any{"store": map[string]any{"min_free": float64(1 << 31)}}} // as values files have numbers
	all := rendered(t, values)
	keys := t.TempDir()
	for name, text := range all["Secret site-kvmeter"].(*corev1.Secret).StringData {
		if err := os.WriteFile(filepath.Join(keys, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for part, args := range map[string][]string{
		"central": {"kvmeter", "central"}, "notifier": {"kvmeter", "notifier"}, "agent": {"kvmeter-agent"},
	} {
		path := filepath.Join(t.TempDir(), part+".yaml")
		if err := os.WriteFile(path, []byte(all["ConfigMap site-kvmeter-"+part].(*corev1.ConfigMap).Data[part+".yaml"]), 0o600); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(filepath.Join(bin, args[0]), append(args[1:], "--config", path, "--check-config")...)
		// The keys are not where they will be mounted.
		cmd.Env = append(os.Environ(), "KVMETER_KEYS="+keys, "KVMETER_NAME=kvmeter-notifier-0")
		if part == "agent" {
			cmd.Env = append(os.Environ(), "KVMETER_KEY_FILE="+filepath.Join(keys, "compute-1.key"))
		}
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Errorf("%s: %v\n%s", part, err, out)
		}
		if part == "central" && !strings.Contains(string(out), "kvmeter-notifier-0") {
			t.Errorf("central does not take what the notifier signs:\n%s", out)
		}
	}
}

func TestWhatIsMissingIsSaid(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(values map[string]any)
		want   string
	}{
		"no broker":            {change: func(v map[string]any) { delete(v, "amqpURL") }, want: "amqpURL: say where the broker is"},
		"no key of a notifier": {change: func(v map[string]any) { v["notifier"] = map[string]any{"replicas": 2} }, want: "there is none for kvmeter-notifier-1"},
		"a short key":          {change: func(v map[string]any) { v["keys"].(map[string]any)["compute-1"] = "short" }, want: "less than 16 bytes"},
		"a word that is none":  {change: func(v map[string]any) { v["agents"] = map[string]any{} }, want: "agents"},
	} {
		t.Run(name, func(t *testing.T) {
			values := least()
			tc.change(values)
			if _, err := render(values); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want %q", err, tc.want)
			}
		})
	}
}

func TestASecretOfOnesOwn(t *testing.T) {
	all := rendered(t, map[string]any{"existingSecret": "mine", "agent": map[string]any{"enabled": false}})
	for name := range all {
		if strings.HasPrefix(name, "Secret") || strings.HasPrefix(name, "DaemonSet") {
			t.Errorf("%s is made", name)
		}
	}
}
