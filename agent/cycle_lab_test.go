//go:build lab

package agent

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/digitalocean/go-libvirt"

	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/sample"
	"github.com/kvmeter/kvmeter/test/lab"
)

// Where a change of a domain applies: virDomainModificationImpact.
const live = 1

// cycle is a guest to which things happen.
type cycle struct {
	t    *testing.T
	lab  *lab.Lab
	conn *libvirt.Libvirt
	g    *lab.Guest
	r    *recorder
}

// newest waits for a sample that was made from now on.
func (c *cycle) newest(m *sample.Meter, resource string) sample.Sample {
	c.t.Helper()
	return c.r.await(m, resource, time.Now()).Sample
}

// ceased waits until no sample of the resource has come for as long as three
// usually take, and fails the test if they go on.
func (c *cycle) ceased(m *sample.Meter, resource string) {
	c.t.Helper()
	for range 20 {
		time.Sleep(1500 * time.Millisecond)
		// Others show that the agent goes on.
		at := c.newest(sample.CPU, c.g.UUID).Time - 1_500_000
		c.r.mu.Lock()
		goes := false
		for _, s := range c.r.all {
			goes = goes || s.Name == m.Name && s.Resource == resource && s.Time > at
		}
		c.r.mu.Unlock()
		if !goes {
			return
		}
	}
	c.t.Errorf("%s of %s goes on", m.Name, resource)
}

// same checks that a series goes on where it was.
func (c *cycle) same(before, after sample.Sample) {
	c.t.Helper()
	if after.Incarnation != before.Incarnation || after.Volume.Bits < before.Volume.Bits {
		c.t.Errorf("%s of %s was %s of incarnation %s, is %s of %s", before.Name, before.Resource, before.Volume, before.Incarnation, after.Volume, after.Incarnation)
	}
}

// anew waits until a domain's CPU is of another incarnation.
func (c *cycle) anew(before sample.Sample) sample.Sample {
	c.t.Helper()
	for at := time.Now(); ; {
		s := c.r.await(sample.CPU, c.g.UUID, at).Sample
		if s.Incarnation != before.Incarnation {
			return s
		}
		at = time.UnixMicro(s.Time)
	}
}

// labelled waits until the metadata of the guest's samples has a text.
func (c *cycle) labelled(text string) {
	c.t.Helper()
	awaitThat(c.t, c.r, sample.CPU, c.g, func(s sample.Sample) bool { return strings.Contains(string(s.Metadata), text) })
}

func (c *cycle) domain() libvirt.Domain { return c.g.Domain() }

// TestLabLifeCycle does to a guest what clouds do to theirs. The recorder fails
// it if a counter goes back within its incarnation.
func TestLabLifeCycle(t *testing.T) {
	ctx := t.Context()
	l := lab.Start(t, lab.Options{Apart: true})
	must(t, l.StartLibvirt(ctx))
	r := newRecorder(t)
	startAgent(t, l, r, onHost(t, l, "cycle"), func(cfg *Config, _ *Deps) { cfg.CrosscheckInterval = 0 })
	g, err := l.StartGuest(ctx, lab.GuestSpec{
		Name: "first-name", Disks: []lab.Disk{{Format: "qcow2"}}, Edits: []string{"<vcpu>1</vcpu>", "<vcpu current='1'>2</vcpu>"},
	})
	must(t, err)
	conn, err := l.Connect(ctx)
	must(t, err)
	c := &cycle{t, l, conn, g, r}
	nic := g.Name + "-" + g.UUID + "-" + g.NICs()[0].Tap
	accounts := newLedger(t, g, r)
	exec := func(t *testing.T, command string) {
		t.Helper()
		out, err := g.Exec(ctx, command)
		if err != nil {
			t.Fatal(err, out)
		}
	}
	on := func(name string, f func(t *testing.T)) {
		t.Run(name, func(t *testing.T) {
			c.t, accounts.t = t, t
			f(t)
		})
	}

	on("paused, it uses nothing, and goes on", func(t *testing.T) {
		before := c.newest(sample.CPU, g.UUID)
		must(t, g.Pause(ctx))
		awaitThat(t, r, sample.PowerState, g, func(s sample.Sample) bool { return s.Volume.Bits == 3 })
		a := c.newest(sample.CPU, g.UUID)
		b := c.newest(sample.CPU, g.UUID)
		c.same(before, a)
		if a.Volume != b.Volume {
			t.Errorf("its vCPU used %d ns while it was paused", b.Volume.Bits-a.Volume.Bits)
		}
		must(t, g.Resume(ctx))
		awaitThat(t, r, sample.PowerState, g, func(s sample.Sample) bool { return s.Volume.Bits == 1 })
		exec(t, "write 4096 10")
		accounts.balance(0, 0)
	})

	on("its display name follows Nova's", func(t *testing.T) {
		xml, err := conn.DomainGetXMLDesc(c.domain(), 0)
		must(t, err)
		before := c.newest(sample.CPU, g.UUID)
		const uri = "http://openstack.org/xmlns/libvirt/nova/1.1"
		_, nova, _ := strings.Cut(xml, `<nova:instance xmlns:nova="`+uri+`">`)
		nova, _, _ = strings.Cut(nova, "</nova:instance>")
		nova = "<instance>" + strings.NewReplacer("first-name", "second-name", "nova:", "").Replace(nova) + "</instance>"
		must(t, conn.DomainSetMetadata(c.domain(), 2, libvirt.OptString{nova}, libvirt.OptString{"nova"},
			libvirt.OptString{uri}, live))
		c.labelled(`"display_name":"second-name"`)
		c.same(before, c.newest(sample.CPU, g.UUID))
	})

	on("reverted to a snapshot, it is not counted twice", func(t *testing.T) {
		snap, err := conn.DomainSnapshotCreateXML(c.domain(), "<domainsnapshot><name>then</name></domainsnapshot>", 0)
		must(t, err)
		exec(t, "write 4096 100")
		exec(t, "udp 300 100")
		accounts.balance(0, 0)
		before := c.newest(sample.CPU, g.UUID)
		process, err := bpf.ProcessCPUClock(g.PID())
		must(t, err)
		pid := g.PID()
		must(t, conn.DomainRevertToSnapshot(snap, 0))
		if g.PID() == pid {
			t.Skip("this libvirt reverts within the process: all its counters go on")
		}
		c.anew(before)
		ours := accounts.ours
		accounts.guest, accounts.ours = accounts.read(0)
		for i, m := range ledgerMeters { // the guest has forgotten what it did
			if got := accounts.ours[i] - ours[i]; got != 0 && !strings.HasPrefix(m.meter.Name, "network.outgoing") {
				t.Errorf("%s grew by %d with the revert", m.meter.Name, got)
			}
		}
		if got := sumOf(sample.CPUProcess, g.UUID, r); got < process {
			t.Errorf("its CPU time is %d ns, was %d before", got, process)
		}
		exec(t, "write 4096 30")
		accounts.balance(0, 0)
	})

	on("reset, it goes on", func(t *testing.T) {
		k, err := l.StartGuest(ctx, lab.GuestSpec{Kind: lab.KVM, Mode: "disk"})
		must(t, err)
		reads := func(want uint64) (s sample.Sample) {
			t.Helper()
			for range 120 {
				if s = c.newest(sample.DiskReadRequests, k.UUID+"-hda"); s.Volume.Bits >= want {
					break
				}
			}
			if s.Volume.Bits != want {
				t.Fatalf("it made %s requests, want %d", s.Volume, want)
			}
			return s
		}
		disk, cpu := reads(lab.DiskReads), c.newest(sample.CPU, k.UUID)
		must(t, conn.DomainReset(k.Domain(), 0))
		c.same(disk, reads(2*lab.DiskReads))
		c.same(cpu, c.newest(sample.CPU, k.UUID))
	})

	on("a vCPU that is plugged in has meters", func(t *testing.T) {
		before := c.newest(sample.CPU, g.UUID)
		must(t, conn.DomainSetVcpusFlags(c.domain(), 2, live))
		r.await(sample.VCPURun, g.UUID+"-vcpu1", time.Now())
		awaitThat(t, r, sample.VCPUs, g, func(s sample.Sample) bool { return s.Volume.Bits == 2 })
		c.same(before, c.newest(sample.CPU, g.UUID))
	})

	on("a disk that is plugged in counts from zero, and again when it comes back", func(t *testing.T) {
		image := filepath.Join(t.TempDir(), "vdb.raw")
		must(t, os.WriteFile(image, make([]byte, 1<<20), 0o666))
		xml := `<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='` + image +
			`'/><target dev='vdb' bus='virtio'/><serial>c1d2</serial></disk>`
		var incarnations []sample.Incarnation
		for n := range 2 {
			must(t, conn.DomainAttachDeviceFlags(c.domain(), xml, live))
			first := c.newest(sample.DiskWriteRequests, g.UUID+"-vdb")
			if first.Volume.Bits != 0 {
				t.Errorf("plugged in %d times, it has %s requests", n+1, first.Volume)
			}
			incarnations = append(incarnations, first.Incarnation)
			for range 40 { // the guest takes its time to see it
				if _, err = g.Exec(ctx, "write 4096 16 vdb"); err == nil {
					break
				}
				time.Sleep(250 * time.Millisecond)
			}
			must(t, err)
			if got := c.newest(sample.DiskWriteRequests, g.UUID+"-vdb"); got.Volume.Bits != 16 || got.Incarnation != first.Incarnation {
				t.Errorf("plugged in %d times: %s requests of incarnation %s, want 16 of %s", n+1, got.Volume, got.Incarnation, first.Incarnation)
			}
			must(t, conn.DomainDetachDeviceFlags(c.domain(), xml, live))
			c.ceased(sample.DiskWriteRequests, g.UUID+"-vdb")
		}
		if incarnations[0] == incarnations[1] {
			t.Error("both times it is the same incarnation")
		}
		if got := sumOf(sample.DiskWriteRequests, g.UUID+"-vdb", r); got != 32 {
			t.Errorf("it has %d requests in all, want 32", got)
		}
	})

	on("a NIC that is plugged in counts from zero, and to its end", func(t *testing.T) {
		tap := "kmnic" + l.ID()
		resource := g.Name + "-" + g.UUID + "-" + tap
		xml := `<interface type='bridge'><mac address='fa:16:3e:00:00:77'/><source bridge='kmbr` + l.ID() + `'/><target dev='` + tap + `'/><model type='virtio'/></interface>`
		var incarnations []sample.Incarnation
		for range 2 {
			must(t, conn.DomainAttachDeviceFlags(c.domain(), xml, live))
			first := c.newest(sample.NetInPackets, resource)
			if first.Volume.Bits != 0 {
				t.Errorf("it has %s packets at first", first.Volume)
			}
			incarnations = append(incarnations, first.Incarnation)
			must(t, conn.DomainDetachDeviceFlags(c.domain(), xml, live))
			c.ceased(sample.NetInPackets, resource)
		}
		if incarnations[0] == incarnations[1] {
			t.Error("both times it is the same incarnation")
		}
		if gap := accounts.gap(resource); gap != nil {
			t.Errorf("gap: %+v", gap)
		}
	})

	on("undefined and defined while it runs, it goes on", func(t *testing.T) {
		xml, err := conn.DomainGetXMLDesc(c.domain(), libvirt.DomainXMLInactive|libvirt.DomainXMLSecure)
		must(t, err)
		before := c.newest(sample.CPU, g.UUID)
		must(t, conn.DomainUndefineFlags(c.domain(), 0))
		c.same(before, c.newest(sample.CPU, g.UUID))
		_, err = conn.DomainDefineXML(strings.Replace(xml, "<memory ", "<title>another</title><memory ", 1))
		must(t, err)
		after := c.newest(sample.CPU, g.UUID)
		c.same(before, after)
		if after.Project != before.Project {
			t.Errorf("its project is %q, was %q", after.Project, before.Project)
		}
		exec(t, "write 4096 5")
		accounts.balance(0, 0)
	})

	on("saved and restored, it is counted to the last request", func(t *testing.T) {
		before := c.newest(sample.CPU, g.UUID)
		accounts.work()
		clock := lastClock(g.PID())
		must(t, conn.DomainManagedSave(c.domain(), 0))
		ended := clock()
		must(t, conn.DomainCreate(c.domain()))
		after := c.anew(before)
		if after.Project != before.Project {
			t.Errorf("its project is %q, was %q", after.Project, before.Project)
		}
		accounts.balance(0, 1)
		r.mu.Lock()
		var last uint64
		for _, s := range r.all {
			if s.Name == sample.CPUProcess.Name && s.Resource == g.UUID && s.Incarnation == before.Incarnation {
				last = max(last, s.Volume.Bits)
			}
		}
		r.mu.Unlock()
		if last < ended || last > ended+exitCPU {
			t.Errorf("its CPU time was %d ns at last, by the clock of the process %d", last, ended)
		}
	})

	on("renamed, it is metered under its new name", func(t *testing.T) {
		before := c.newest(sample.CPU, g.UUID)
		must(t, g.PowerOff(ctx))
		snapshots, _, err := conn.DomainListAllSnapshots(c.domain(), 1, 0)
		must(t, err)
		for _, s := range snapshots {
			must(t, conn.DomainSnapshotDelete(s, 0))
		}
		_, err = conn.DomainRename(c.domain(), libvirt.OptString{"renamed-" + l.ID()}, 0)
		must(t, err)
		must(t, conn.DomainCreate(libvirt.Domain{Name: "renamed-" + l.ID(), UUID: c.domain().UUID, ID: -1}))
		after := c.anew(before)
		if !strings.Contains(string(after.Metadata), fmt.Sprintf(`"name":"renamed-%s"`, l.ID())) || after.Project != before.Project {
			t.Errorf("project %q, %s", after.Project, after.Metadata)
		}
		renamed := "renamed-" + l.ID() + "-" + g.UUID + "-" + g.NICs()[0].Tap
		if s := c.newest(sample.NetInPackets, renamed); s.Incarnation == 0 {
			t.Errorf("its NIC is %+v", s)
		}
		c.ceased(sample.NetInPackets, nic)
	})
}
