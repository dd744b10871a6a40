package lab

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/digitalocean/go-libvirt"
	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/test/boot"
)

// Guest is one guest of a lab.
type Guest struct {
	// Name is libvirt's name of the domain, instance-%08x.
	Name string
	UUID string
	// Spec is what it was made of, defaults filled in.
	Spec GuestSpec

	lab    *Lab // that made it, and has its files
	host   *Lab // on whose libvirtd it is
	number int
	serial sync.Mutex // one command at a time
}

// record is what the lab keeps of a guest on disk.
type record struct {
	Number  int
	Created time.Time
	Spec    GuestSpec
}

// StartGuest makes a guest, defines it in libvirt and starts it. A Linux guest
// obeys [Guest.Exec] when StartGuest returns, some 3 s after its start on an idle
// machine. Several may be started at once.
func (l *Lab) StartGuest(ctx context.Context, spec GuestSpec) (*Guest, error) {
	g, err := l.NewGuest(ctx, spec)
	if err != nil {
		return nil, err
	}
	if err := g.Start(ctx); err != nil {
		return nil, errors.Join(err, g.Destroy(context.WithoutCancel(ctx)))
	}
	return g, nil
}

// NewGuest makes a guest for [Guest.Start]; libvirt hears of it only then. It has
// the next number; none is used twice, as with Nova.
func (l *Lab) NewGuest(ctx context.Context, spec GuestSpec) (*Guest, error) {
	g, err := l.newGuest(ctx, spec)
	if err != nil {
		return nil, fmt.Errorf("make guest: %w", err)
	}
	return g, nil
}

func (l *Lab) newGuest(ctx context.Context, spec GuestSpec) (*Guest, error) {
	if err := os.MkdirAll(l.path("instances"), 0o755); err != nil {
		return nil, err
	}
	unlock, err := boot.Lock(ctx, l.path("guests.lock"))
	if err != nil {
		return nil, err
	}
	defer unlock()
	var number int
	last := l.path("last-guest.json")
	if err := readJSON(last, &number); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	number++
	spec, err = spec.withDefaults(number)
	if err != nil {
		return nil, err
	}
	g := l.guest(number, spec)
	if err := os.Mkdir(g.dir(), 0o755); err != nil {
		return nil, err
	}
	return g, errors.Join(writeJSON(last, number), writeJSON(g.file("guest.json"), record{number, time.Now().UTC(), spec}))
}

func (l *Lab) guest(number int, spec GuestSpec) *Guest {
	id := l.identity(number)
	return &Guest{Name: id.Name, UUID: id.UUID, Spec: spec, lab: l, host: l, number: number}
}

// Guests lists the lab's guests, running or not, by number.
func (l *Lab) Guests() ([]*Guest, error) {
	entries, err := os.ReadDir(l.path("instances"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list guests: %w", err)
	}
	var guests []*Guest
	for _, e := range entries {
		var r record
		if err := readJSON(l.path("instances", e.Name(), "guest.json"), &r); err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				continue // being made or destroyed
			}
			return nil, fmt.Errorf("list guests: %w", err)
		}
		guests = append(guests, l.guest(r.Number, r.Spec))
	}
	return guests, nil
}

// Guest finds a guest by its name, its UUID or its number.
func (l *Lab) Guest(which string) (*Guest, error) {
	guests, err := l.Guests()
	if err != nil {
		return nil, err
	}
	for _, g := range guests {
		if which == g.Name || which == g.UUID || which == strconv.Itoa(g.number) {
			return g, nil
		}
	}
	return nil, fmt.Errorf("no guest %q in lab %s", which, l.dir)
}

// Number is the guest's number in the lab, from 1.
func (g *Guest) Number() int { return g.number }

func (g *Guest) dir() string { return g.lab.path("instances", g.Name) }

func (g *Guest) file(name string) string { return g.lab.path("instances", g.Name, name) }

// Console is the path of what the guest's kernel or ROM says.
func (g *Guest) Console() string { return g.file("console.log") }

// NICs are the guest's NICs in order.
func (g *Guest) NICs() []NIC {
	var nics []NIC
	for n := range max(g.Spec.NICs, 0) {
		nics = append(nics, g.lab.identity(g.number).nic(n))
	}
	return nics
}

// DiskPaths are the guest's image files in the order of its disks.
func (g *Guest) DiskPaths() []string {
	var paths []string
	for _, d := range g.Spec.disks(g.dir()) {
		paths = append(paths, d.Path)
	}
	return paths
}

// Start starts a guest that is not running; its disks are as they were left.
func (g *Guest) Start(ctx context.Context) error {
	if g.Spec.Kind == KVM {
		if err := checkKVM(); err != nil {
			return err
		}
	}
	if err := g.start(ctx); err != nil {
		return fmt.Errorf("start guest %s: %w", g.Name, err)
	}
	g.lab.log.Info("guest runs", zap.String("name", g.Name), zap.String("kind", string(g.Spec.Kind)), zap.Int("pid", g.PID()))
	if g.Spec.Kind != Linux {
		return nil
	}
	return g.WaitReady(ctx)
}

func (g *Guest) start(ctx context.Context) error {
	xml, err := g.XML(ctx)
	if err != nil {
		return err
	}
	for _, d := range g.Spec.disks(g.dir()) {
		if err := makeDisk(ctx, d); err != nil {
			return err
		}
		if d.AIO == "native" {
			if err := g.lab.raiseAIO(); err != nil {
				return fmt.Errorf("raise fs.aio-max-nr: %w", err)
			}
		}
	}
	if err := g.host.makeBridge(); err != nil {
		return err
	}
	conn, err := g.host.Connect(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Disconnect() }()
	dom, err := conn.DomainDefineXML(xml)
	if err != nil {
		return err
	}
	ours, kept := g.host.capabilities()
	if err := copyNew(ours, kept); err != nil {
		return fmt.Errorf("keep what libvirt knows about QEMU: %w", err)
	}
	// Paused, so that the guest sees its NICs only after they are quiet.
	if dom, err = conn.DomainCreateWithFlags(dom, uint32(libvirt.DomainStartPaused)); err != nil {
		return err
	}
	for _, nic := range g.NICs() {
		if err := g.host.Inside(func() error { return quiet(nic.Tap) }); err != nil {
			return err
		}
	}
	return conn.DomainResume(dom)
}

// XML is the domain as it is given to libvirt.
func (g *Guest) XML(ctx context.Context) (string, error) {
	img, err := g.lab.images(ctx, g.Spec)
	if err != nil {
		return "", err
	}
	emulator, err := lookPath("qemu-system-x86_64")
	if err != nil {
		return "", err
	}
	var r record
	if err := readJSON(g.file("guest.json"), &r); err != nil {
		return "", err
	}
	return domain{
		ID: g.lab.identity(g.number), Spec: g.Spec, NICs: g.NICs(), Disks: g.Spec.disks(g.dir()),
		Images: img, Bridge: g.host.bridge(), Emulator: emulator, Console: g.Console(), Serial: g.socket(),
		Created: r.Created.Format(time.DateTime),
	}.render()
}

func makeDisk(ctx context.Context, d disk) error {
	if _, err := os.Stat(d.Path); err == nil {
		return nil
	}
	size := int64(d.SizeMiB) << 20
	if d.Format == "raw" {
		f, err := os.Create(d.Path)
		if err != nil {
			return err
		}
		return errors.Join(f.Truncate(size), f.Close())
	}
	out, err := exec.CommandContext(ctx, "qemu-img", "create", "-q", "-f", d.Format, d.Path, strconv.FormatInt(size, 10)).CombinedOutput()
	if err != nil {
		return fmt.Errorf("make disk %s: %w: %s", d.Path, err, strings.TrimSpace(string(out)))
	}
	return nil
}

// PID is the id of the guest's QEMU process, 0 when it does not run.
func (g *Guest) PID() int {
	found, err := g.lab.processes(g.isMine)
	if err != nil || len(found) == 0 {
		return 0
	}
	return found[0].pid
}

func (g *Guest) isMine(p process) bool {
	for _, arg := range p.args {
		if arg == g.UUID {
			return true
		}
	}
	return false
}

// do runs one call on the guest's domain.
func (g *Guest) do(ctx context.Context, what string, call func(*libvirt.Libvirt, libvirt.Domain) error) error {
	conn, err := g.host.Connect(ctx)
	if err == nil {
		defer func() { _ = conn.Disconnect() }()
		err = call(conn, g.Domain())
	}
	if err != nil {
		return fmt.Errorf("%s guest %s: %w", what, g.Name, err)
	}
	return nil
}

// Stats are libvirt's bulk statistics of the guest by libvirt's names, such as
// block.0.wr.reqs, net.0.rx.pkts and cpu.time; those that are no unsigned
// integers are left out.
func (g *Guest) Stats(ctx context.Context) (map[string]uint64, error) {
	stats := map[string]uint64{}
	err := g.do(ctx, "read statistics of", func(conn *libvirt.Libvirt, d libvirt.Domain) error {
		records, err := conn.ConnectGetAllDomainStats([]libvirt.Domain{d}, 0, 0)
		if err != nil {
			return err
		}
		for _, r := range records {
			for _, p := range r.Params {
				switch v := p.Value.I.(type) {
				case uint64:
					stats[p.Field] = v
				case uint32:
					stats[p.Field] = uint64(v)
				}
			}
		}
		return nil
	})
	return stats, err
}

// Domain names the guest in calls to libvirt.
func (g *Guest) Domain() libvirt.Domain {
	d := libvirt.Domain{Name: g.Name, ID: -1}
	_, _ = hex.Decode(d.UUID[:], []byte(strings.ReplaceAll(g.UUID, "-", "")))
	return d
}

// Migrate moves the guest, while it runs, to another lab's libvirtd, where it is
// defined from then on. Its files stay where they are.
func (g *Guest) Migrate(ctx context.Context, to *Lab) error {
	from := g.socket()
	g.serial.Lock()
	defer g.serial.Unlock()
	if err := to.makeBridge(); err != nil {
		return fmt.Errorf("migrate guest %s: %w", g.Name, err)
	}
	err := g.do(ctx, "migrate", func(conn *libvirt.Libvirt, d libvirt.Domain) error {
		xml, err := conn.DomainGetXMLDesc(d, libvirt.DomainXMLMigratable|libvirt.DomainXMLSecure)
		if err != nil {
			return err
		}
		xml = strings.NewReplacer(g.host.bridge(), to.bridge(), from, to.path("run", filepath.Base(from))).Replace(xml)
		params := []libvirt.TypedParam{
			{Field: libvirt.MigrateParamDestXML, Value: *libvirt.NewTypedParamValueString(xml)},
			{Field: libvirt.MigrateParamPersistXML, Value: *libvirt.NewTypedParamValueString(xml)},
			{Field: libvirt.MigrateParamURI, Value: *libvirt.NewTypedParamValueString("unix://" + to.path("run", g.Name+".migration"))},
		}
		_, err = conn.DomainMigratePerform3Params(d, libvirt.OptString{"qemu+unix:///system?socket=" + to.Socket()}, params, nil,
			libvirt.MigrateLive|libvirt.MigratePeer2peer|libvirt.MigratePersistDest|libvirt.MigrateUndefineSource|
				libvirt.MigrateUnsafe) // libvirt does not know that both see the same files
		return err
	})
	if err == nil {
		g.host = to
	}
	return err
}

// Pause stops the guest's CPUs.
func (g *Guest) Pause(ctx context.Context) error {
	return g.do(ctx, "pause", (*libvirt.Libvirt).DomainSuspend)
}

// Resume lets the guest's CPUs run again.
func (g *Guest) Resume(ctx context.Context) error {
	return g.do(ctx, "resume", (*libvirt.Libvirt).DomainResume)
}

// PowerOff ends the guest at once and keeps it defined, for [Guest.Start].
func (g *Guest) PowerOff(ctx context.Context) error {
	return g.do(ctx, "power off", (*libvirt.Libvirt).DomainDestroy)
}

// Kill9 kills the guest's QEMU process, as the out-of-memory killer would.
func (g *Guest) Kill9(ctx context.Context) error {
	return g.lab.kill(ctx, g.Name, g.isMine)
}

// Destroy ends the guest, if it runs, and removes it with its disks.
func (g *Guest) Destroy(ctx context.Context) error {
	err := g.do(ctx, "destroy", func(conn *libvirt.Libvirt, d libvirt.Domain) error {
		if err := conn.DomainDestroy(d); err != nil && !isCode(err, libvirt.ErrOperationInvalid, libvirt.ErrNoDomain) {
			return err
		}
		if err := conn.DomainUndefine(d); err != nil && !isCode(err, libvirt.ErrNoDomain) {
			return err
		}
		return nil
	})
	return errors.Join(err, os.RemoveAll(g.dir()))
}

func isCode(err error, codes ...libvirt.ErrorNumber) bool {
	var e libvirt.Error
	if !errors.As(err, &e) {
		return false
	}
	for _, c := range codes {
		if e.Code == uint32(c) {
			return true
		}
	}
	return false
}

// Running tells whether the guest has a QEMU process; a paused one has.
func (g *Guest) Running() bool { return g.PID() != 0 }

// lock keeps other processes from using the guest's serial port.
func (g *Guest) lock(ctx context.Context) (unlock func(), err error) {
	unlock, err = boot.Lock(ctx, g.file("serial.lock"))
	if err != nil {
		return nil, fmt.Errorf("wait for another command to end: %w", err)
	}
	return unlock, nil
}
