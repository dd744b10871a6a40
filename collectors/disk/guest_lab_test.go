//go:build lab

package disk

import (
	"fmt"
	"os"
	"testing"

	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/collectors"
	"github.com/kvmeter/kvmeter/test/lab"
)

// TestLibvirtCountsTheSame: of a raw image with direct I/O, whatever the aio
// mode, libvirt's figures are the hook's plus what the kernel kept silent about,
// which is what its accounting of the process has more than the hook.
func TestLibvirtCountsTheSame(t *testing.T) {
	if exact {
		t.Skip("a lab can't run in a guest")
	}
	ctx := t.Context()
	l := lab.Start(t, lab.Options{})
	if err := l.StartLibvirt(ctx); err != nil {
		t.Fatal(err)
	}
	modes := []string{"native", "threads", "io_uring"}
	var disks []lab.Disk
	for _, mode := range modes {
		disks = append(disks, lab.Disk{AIO: mode})
	}
	g, err := l.StartGuest(ctx, lab.GuestSpec{Disks: disks})
	if err != nil {
		t.Fatal(err)
	}
	if err := g.WaitReady(ctx); err != nil {
		t.Fatal(err)
	}
	h := open(t)
	target := collectors.Target{ID: 1, Proc: bpf.Proc{PID: g.PID()}}
	for i, path := range g.DiskPaths() {
		target.Disks = append(target.Disks, vd(uint32(2+i), path))
	}
	if err := h.Follow([]collectors.Target{target}); err != nil {
		t.Fatal(err)
	}
	for i, mode := range modes {
		t.Run(mode, func(t *testing.T) {
			id, device := uint32(2+i), fmt.Sprintf("vd%c", 'a'+i)
			figures := func() (libvirt counted, accounted [2]uint64) {
				t.Helper()
				s, err := g.Stats(ctx)
				if err != nil {
					t.Fatal(err)
				}
				of := func(name string) uint64 { return s[fmt.Sprintf("block.%d.%s", i, name)] }
				accounted[0], accounted[1] = accountedTo(t, g.PID())
				return counted{of("rd.reqs"), of("rd.bytes"), of("wr.reqs"), of("wr.bytes"), of("fl.reqs")}, accounted
			}
			hook0 := read(t, h)[id]
			libvirt0, accounted0 := figures()
			for _, command := range []string{"write 65536 512 ", "read 4096 1000 ", "flush "} {
				if out, err := g.Exec(ctx, command+device); err != nil {
					t.Fatalf("%s: %v %s", command, err, out)
				}
			}
			libvirt1, accounted1 := figures()
			hook1 := read(t, h)[id]
			less := func(a, b counted) counted {
				return counted{a.Reads - b.Reads, a.ReadBytes - b.ReadBytes, a.Writes - b.Writes, a.WriteBytes - b.WriteBytes, a.Flushes - b.Flushes}
			}
			libvirt, hook := less(libvirt1, libvirt0), less(hook1, hook0)
			if want := (counted{1000, 1000 * 4096, 512, 512 * 65536, 1}); libvirt != want {
				t.Errorf("libvirt counted %+v, the guest did %+v", libvirt, want)
			}
			check(t, h, hook, libvirt)
			// What lacks, as the agent tells it. QEMU reads pages of its program and
			// writes the guest's console to a file, too.
			const own = 64 << 10
			for n, bytes := range [2]struct{ hook, libvirt uint64 }{{hook.ReadBytes, libvirt.ReadBytes}, {hook.WriteBytes, libvirt.WriteBytes}} {
				if got := accounted1[n] - accounted0[n]; got < bytes.libvirt || got > bytes.libvirt+own {
					t.Errorf("%s: hook %d + shortfall %d bytes, libvirt %d", [2]string{"read", "write"}[n], bytes.hook, got-bytes.hook, bytes.libvirt)
				}
			}
		})
	}
}

// accountedTo is what the kernel has accounted to a process as read from and
// written to storage.
func accountedTo(t testing.TB, pid int) (read, written uint64) {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/io", pid))
	if err != nil {
		t.Fatal(err)
	}
	var ignored uint64
	if _, err := fmt.Sscanf(string(text), "rchar: %d\nwchar: %d\nsyscr: %d\nsyscw: %d\nread_bytes: %d\nwrite_bytes: %d\n",
		&ignored, &ignored, &ignored, &ignored, &read, &written); err != nil {
		t.Fatal(err)
	}
	return read, written
}
