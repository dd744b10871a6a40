//go:build lab

package agent

import (
	"encoding/json"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kvmeter/kvmeter/sample"
	"github.com/kvmeter/kvmeter/test/lab"
)

// TestLabWithoutOpenStack meters a domain that Nova did not make: its owner is where
// the settings say, and without libvirt it is metered all the same.
func TestLabWithoutOpenStack(t *testing.T) {
	ctx := t.Context()
	l := lab.Start(t, lab.Options{})
	must(t, l.StartLibvirt(ctx))
	g, err := l.StartGuest(ctx, lab.GuestSpec{Kind: lab.KVM, Mode: "disk", Edits: []string{
		"http://openstack.org/xmlns/libvirt/nova/1.1", "http://example.org/another",
		"<metadata>", `<title>web shop</title><metadata><o:owner xmlns:o="http://example.org/owner" team="sales"/>
			<t:tags xmlns:t="http://example.org/tags"><t:tag key="billing.centre" value="7"/><t:tag key="colour" value="red"/></t:tags>`,
	}})
	must(t, err)
	nic := g.Name + "-" + g.UUID + "-" + g.NICs()[0].Tap
	type metadata struct {
		DisplayName string            `json:"display_name"`
		Name        string            `json:"name"`
		Flavor      map[string]any    `json:"flavor"`
		User        map[string]string `json:"user_metadata"`
	}
	read := func(s sample.Sample) (m metadata) {
		must(t, json.Unmarshal(s.Metadata, &m))
		return m
	}

	t.Run("its owner, title and tags are in its XML", func(t *testing.T) {
		r := newRecorder(t)
		startAgent(t, l, r, func(cfg *Config, _ *Deps) {
			cfg.OwnerProject, cfg.OwnerUser, cfg.UserMetadata = "title", "metadata/owner/@team", "metadata/tags/tag"
			cfg.ReservedMetadataNamespace = []string{"billing."}
		})
		s := r.await(sample.CPU, g.UUID, time.Time{})
		if s.Project != "web shop" || s.User != "sales" {
			t.Errorf("project %q, user %q", s.Project, s.User)
		}
		if diff := cmp.Diff(metadata{DisplayName: "web shop", Name: g.Name, User: map[string]string{"centre": "7"}}, read(s.Sample)); diff != "" {
			t.Errorf("metadata (-want +got):\n%s", diff)
		}
		r.await(sample.NetInBytes, nic, time.Time{})
		if s := r.await(sample.DiskReadRequests, g.UUID+"-hda", time.Time{}); s.Project != "web shop" {
			t.Errorf("the disk's project is %q", s.Project)
		}
	})

	t.Run("what libvirt is not needed for comes without it", func(t *testing.T) {
		r := newRecorder(t)
		startAgent(t, l, r, func(cfg *Config, _ *Deps) { cfg.Libvirt = nil })
		s := r.await(sample.CPU, g.UUID, time.Time{})
		if diff := cmp.Diff(metadata{Name: g.Name}, read(s.Sample)); diff != "" || s.Project != "" {
			t.Errorf("project %q, metadata (-want +got):\n%s", s.Project, diff)
		}
		r.await(sample.MemoryResident, g.UUID, time.Time{})
		r.await(sample.NetInBytes, nic, time.Time{})
	})
}
