package agent

import (
	"context"
	"errors"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kvmeter/kvmeter/collectors"
	"github.com/kvmeter/kvmeter/collectors/libvirt"
	"github.com/kvmeter/kvmeter/sample"
)

// fakeDiskHook counts a disk's reads, their bytes, its writes and their bytes.
type fakeDiskHook struct {
	fakeHook
	disk [4]uint64
	mute bool // it does not follow the disk
}

func (f *fakeDiskHook) Series() (all []collectors.Series) {
	for _, c := range diskChecks {
		all = append(all, collectors.Series{MeterRef: c.check.Of.MeterRef, Meter: c.check.Of})
	}
	return all
}

func (f *fakeDiskHook) Read(_ context.Context, emit func(uint32, int, uint64)) error {
	for _, t := range f.targets {
		for _, k := range t.Disks {
			for i, n := range f.disk {
				if !f.mute {
					emit(k.ID, i, n)
				}
			}
		}
	}
	return f.fail
}

func TestCrosscheckOfDisks(t *testing.T) {
	const second = "it is compared from its second check on: each side counts from a time of its own"
	raw := collectors.Disk{Device: "vda", Kind: "file", Format: "raw", Direct: true, Sources: []string{"/a.raw"}, Resource: guestUUID(1) + "-vda"}
	every := func(why string) []string {
		var all []string
		for _, c := range diskChecks {
			all = append(all, c.check.Of.Name+" vda: not comparable, "+why)
		}
		return all
	}
	figures := func(reads, readBytes, writes, writeBytes string) []string {
		return []string{
			"disk.host.device.read.requests vda: " + reads, "disk.host.device.read.bytes vda: " + readBytes,
			"disk.host.device.write.requests vda: " + writes, "disk.host.device.write.bytes vda: " + writeBytes,
		}
	}
	good := figures("agrees 100 100 +0", "agrees 409600 409600 +0", "agrees 10 10 +0", "agrees 40960 40960 +0")
	for name, tc := range map[string]struct {
		disk  func(*collectors.Disk)
		adapt func(*world, *fakeDiskHook, *collectors.DiskStats) // between two checks
		want  []string
		gaps  int
	}{
		"both count the same since the check before": {want: good},
		"what the hook missed differs": {
			adapt: func(_ *world, f *fakeDiskHook, _ *collectors.DiskStats) { f.disk[0] -= 40; f.disk[1] -= 40 * 4096 },
			want:  figures("differs 60 100 +40", "agrees 245760 409600 +163840", "agrees 10 10 +0", "agrees 40960 40960 +0"),
		},
		"what the guest has not heard of yet is within the tolerance": {
			adapt: func(_ *world, _ *fakeDiskHook, s *collectors.DiskStats) {
				s.WriteRequests -= 3
				s.WriteBytes -= 3 * 4096
			},
			want: figures("agrees 100 100 +0", "agrees 409600 409600 +0", "agrees 10 7 -3", "agrees 40960 28672 -12288"),
		},
		"a hook that was switched meanwhile is not compared": {
			adapt: func(w *world, _ *fakeDiskHook, _ *collectors.DiskStats) {
				for _, on := range []bool{false, true} {
					if err := w.agent.hooks.turn(w.agent.hooks.find("disk"), on); err != nil {
						t.Error(err)
					}
				}
			},
			want: every("the disk hook was switched since the last check"),
		},
		"a hook that is off is not compared": {
			adapt: func(w *world, _ *fakeDiskHook, _ *collectors.DiskStats) {
				if err := w.agent.hooks.turn(w.agent.hooks.find("disk"), false); err != nil {
					t.Error(err)
				}
			},
			want: every("the disk hook is not attached"),
		},
		"a hook that cannot be read is not compared": {
			adapt: func(_ *world, f *fakeDiskHook, _ *collectors.DiskStats) { f.fail = errors.New("no memory") },
			want:  every("the disk hook cannot be read: no memory"), gaps: 8,
		},
		"a disk that the hook does not follow is not compared": {
			adapt: func(_ *world, f *fakeDiskHook, _ *collectors.DiskStats) { f.mute = true },
			want:  every("the disk hook has seen nothing of it"),
		},
		"a monitor that is busy costs the disks only": {
			adapt: func(w *world, _ *fakeDiskHook, s *collectors.DiskStats) {
				s.Device, w.guests.errs[guestUUID(1)] = "", libvirt.ErrBusy
			},
			want: every("libvirt has no statistics of it: QEMU's monitor is busy or stuck"), gaps: 8,
		},
		"a disk that was attached anew is compared from its second check on": {
			adapt: func(w *world, _ *fakeDiskHook, s *collectors.DiskStats) {
				w.agent.order[0].advance(&w.agent.order[0].disks[0], &collectors.DiskStats{ReadRequests: 7})
				w.agent.order[0].advance(&w.agent.order[0].disks[0], &collectors.DiskStats{})
				w.agent.hooks.stale = true
				w.poll(w.task(false))
			},
			want: every(second),
		},
		"qcow2 is not compared": {
			disk: func(k *collectors.Disk) { k.Format = "qcow2" },
			want: every("its image is qcow2: QEMU reads and writes more than the guest asks for"),
		},
		"the page cache is not compared": {
			disk: func(k *collectors.Disk) { k.Direct = false },
			want: every("the page cache stands between the guest and its image"),
		},
		"an image elsewhere is not compared": {
			disk: func(k *collectors.Disk) { k.Kind = "network" },
			want: every("its image is no file or device of this host (network)"),
		},
		"a disk that is mirrored is not compared": {
			disk: func(k *collectors.Disk) { k.Sources = append(k.Sources, "/b.raw") },
			want: every("it has 2 images"),
		},
	} {
		t.Run(name, func(t *testing.T) {
			hook := &fakeDiskHook{fakeHook: fakeHook{name: "disk"}, disk: [4]uint64{5, 50, 6, 60}}
			w := newWorld(t, 1, func(w *world) {
				k := raw
				if tc.disk != nil {
					tc.disk(&k)
				}
				w.guests.defs[guestUUID(1)].Disks = []collectors.Disk{k}
				w.deps.Hooks = []collectors.Hook{hook}
			})
			check := func(k collectors.DiskStats) (all []string, gaps int) {
				s := w.agreeing(1)
				s.Disks = []collectors.DiskStats{k}
				w.guests.stats[guestUUID(1)] = s
				_, missing := w.checkOnce(1)
				for _, line := range w.checked(1) {
					if line[:4] == "disk" {
						all = append(all, line)
					}
				}
				return all, len(missing)
			}
			w.poll(w.task(false))
			first, _ := check(collectors.DiskStats{Device: "vda", ReadRequests: 1000, ReadBytes: 1e6, WriteRequests: 2000, WriteBytes: 2e6})
			if tc.disk == nil {
				if diff := cmp.Diff(every(second), first); diff != "" {
					t.Errorf("first check (-want +got):\n%s", diff)
				}
			}
			hook.disk = [4]uint64{5 + 100, 50 + 100*4096, 6 + 10, 60 + 10*4096}
			s := collectors.DiskStats{Device: "vda", ReadRequests: 1100, ReadBytes: 1e6 + 100*4096, WriteRequests: 2010, WriteBytes: 2e6 + 10*4096}
			if tc.adapt != nil {
				tc.adapt(w, hook, &s)
			}
			got, gaps := check(s)
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Errorf("second check (-want +got):\n%s", diff)
			}
			if gaps != tc.gaps {
				t.Errorf("%d gaps, want %d", gaps, tc.gaps)
			}
		})
	}
}

func TestADiskIsComparedOverTheTimeThatACheckMissed(t *testing.T) {
	hook := &fakeDiskHook{fakeHook: fakeHook{name: "disk"}}
	w := newWorld(t, 1, func(w *world) {
		w.guests.defs[guestUUID(1)].Disks = []collectors.Disk{{Device: "vda", Kind: "block", Format: "raw", Direct: true, Sources: []string{"/dev/a"}, Resource: "vda"}}
		w.deps.Hooks = []collectors.Hook{hook}
	})
	w.poll(w.task(false))
	for i, n := range []uint64{100, 0, 300} { // at the second, QEMU is stuck
		if s := w.agreeing(1); n > 0 {
			hook.disk[0], s.Disks[0].ReadRequests = n, 5000+n
			w.guests.stats[guestUUID(1)], w.guests.errs[guestUUID(1)] = s, nil
		} else {
			w.guests.stats[guestUUID(1)], w.guests.errs[guestUUID(1)] = collectors.GuestStats{}, libvirt.ErrBusy
		}
		w.checkOnce(1)
		last := w.agent.order[0].check.last
		c := last[slices.IndexFunc(last, func(c comparison) bool { return c.check == sample.CheckDiskReads })]
		if i == 2 && (c.ours != 200 || c.theirs != 200 || c.verdict != sample.Agrees) {
			t.Errorf("after a check that failed: %+v, want 200 on both sides", c)
		}
	}
}
