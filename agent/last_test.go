package agent

import (
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kvmeter/kvmeter/collectors"
	"github.com/kvmeter/kvmeter/collectors/rtnl"
	"github.com/kvmeter/kvmeter/sample"
)

func TestARemovedNICIsCountedToItsEnd(t *testing.T) {
	for name, end := range map[string]func(*world){
		"with its domain": func(w *world) { w.proc.kill(101) },
		"unplugged": func(w *world) {
			def := *w.guests.defs[guestUUID(1)]
			def.NICs = nil
			w.guests.defs = map[string]*collectors.Definition{guestUUID(1): &def}
		},
		"before libvirt tells": func(*world) {},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, 1, nil)
			task := w.task(false)
			w.poll(task)
			w.links.table = nil
			w.links.removed = []rtnl.Removed{
				{Name: "tap1", Link: rtnl.Link{Index: 1, RxBytes: 500, TxBytes: 600, RxPackets: 5, TxPackets: 6}},
				{Name: "tap9", Link: rtnl.Link{Index: 9, RxBytes: 700}}, // nobody's
			}
			end(w)
			samples, gaps := w.poll(task)
			got := brief(samples, "network.incoming.bytes", "network.outgoing.packets")
			if diff := cmp.Diff([]string{"nic1 network.incoming.bytes 600", "nic1 network.outgoing.packets 5"}, got); diff != "" {
				t.Errorf("samples (-want +got):\n%s", diff)
			}
			for _, g := range gaps {
				if g.Resource == "nic1" {
					t.Errorf("gap %+v", g)
				}
			}
			samples, gaps = w.poll(task)
			if got := brief(samples, "network.incoming.bytes"); len(got)+len(gaps) != 0 {
				t.Errorf("samples %v and gaps %+v again", got, gaps)
			}
		})
	}
}

func TestDisksOfAPausedDomainHaveCountedAll(t *testing.T) {
	for name, tc := range map[string]struct {
		resumes bool
		gap     bool
	}{
		"it is taken away":     {},
		"it goes on, and ends": {resumes: true, gap: true},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, 1, nil)
			task := w.task(false)
			w.poll(task)
			w.guests.stats[guestUUID(1)] = collectors.GuestStats{Disks: []collectors.DiskStats{{Device: "vda", ReadBytes: 7}}}
			w.agent.lastOfDisks(t.Context(), guestUUID(1))
			samples, _ := w.take()
			if diff := cmp.Diff([]string{"1-vda disk.device.read.bytes 7"}, brief(samples, "disk.device.read.bytes")); diff != "" {
				t.Errorf("samples (-want +got):\n%s", diff)
			}
			if tc.resumes {
				w.agent.resumed(guestUUID(1))
			}
			w.proc.kill(101)
			_, gaps := w.poll(task)
			gap := slices.ContainsFunc(gaps, func(g sample.Gap) bool { return strings.HasSuffix(g.Resource, "-vda") })
			if gap != tc.gap {
				t.Errorf("gaps %+v", gaps)
			}
		})
	}
}
