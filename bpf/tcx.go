package bpf

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/kvmeter/kvmeter/gen"
)

// Errors of [TCX].
var (
	// ErrNoNetAdmin says that programs for packets can't be loaded or attached.
	ErrNoNetAdmin = errors.New("CAP_NET_ADMIN is needed")
	// ErrNoInterface says that there is no such interface (any more) in the
	// network namespace of the calling thread.
	ErrNoInterface = errors.New("the host's network namespace has no such interface")
	// ErrTooManyNICs says that no more NICs can be followed.
	ErrTooManyNICs = fmt.Errorf("%d NICs are followed already", maxNICs)
)

// Constants of tcx.bpf.c.
const (
	maxNICs       = 2048 // MAX_NICS
	firstSize     = 4    // FIRST_SIZE
	sizeBuckets   = 16   // SIZES
	incoming      = 0    // enum direction
	outgoing      = 1
	directions    = 2
	unnamedReason = "other"
)

// Sizes is how many buckets there are for packet sizes.
const Sizes = sizeBuckets

// SizeExponent returns the exponent of a bucket of packet sizes: it holds
// packets of 2^n to 2^(n+1)-1 bytes, the first smaller ones too, the last larger.
func SizeExponent(bucket int) int {
	return firstSize + bucket
}

// Traffic counts the packets of one direction of a NIC.
type Traffic struct {
	Packets  uint64 // as the kernel handles them: one may be many on a wire (GSO)
	Bytes    uint64 // Ethernet headers and VLAN tags included
	Segments uint64 // packets on a wire
	Sizes    [Sizes]uint64
}

// NICTraffic is what was counted of a NIC, in the guest's direction, since it
// was added. Incoming counts what the host sent to the guest before it is put in
// the tap's queue; what finds no room there is in Incoming and in Drops, and not
// in the interface's own packets.
type NICTraffic struct {
	Incoming, Outgoing Traffic
	// Drops is how many packets the host dropped by reason, an index into
	// [TCX.Reasons]; shared by all calls of [TCX.Read]'s emit. Empty if none.
	Drops []uint64
}

// TCXOptions say what to count beside packets, bytes and segments.
type TCXOptions struct {
	Sizes bool // packet sizes
	Drops bool // reasons of drops, where the kernel tells them (Linux 5.17)
	// Clsact attaches the way that kernels before 6.6 need, on any kernel.
	Clsact bool
}

// TCX counts packets of NICs as they pass the tap device. It is for one
// goroutine at a time.
//
// Loading takes CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN. Attaching to an
// interface, which is done whenever one is added, takes no capability where the
// kernel has TCX (Linux 6.6; it asks only for the loaded program), and
// CAP_NET_ADMIN over the network namespace else: [TCX.NeedsNetAdmin]. Reading,
// detaching and closing take none, but for clsact's detaching. Interfaces are
// those of the network namespace of the thread that loaded.
//
// A packet of a NIC costs some 30 ns, one that the host drops for anybody else 8
// ns (docs/hooks.md).
//
// With TCX the kernel waits for all its CPUs (synchronize_rcu) twice for each
// interface that it attaches to or detaches from, some 20 ms in all. A goroutine
// of its own does that, so that nobody else waits; only Close does. When the
// process ends the kernel detaches at the same pace. With clsact the programs
// stay until the next start replaces or the tap's end removes them; they then
// count into maps that nobody reads.
type TCX struct {
	objs     gen.TCXObjects
	traffics *ebpf.Memory
	sizes    *ebpf.Memory // nil: not counted
	drops    *ebpf.Memory // nil: not counted
	maybe    *maybe
	reasons  []string  // from number 1 on; empty without drops
	dropsErr error     // why reasons of drops are not counted
	dropLink link.Link // of kfree_skb
	nics     []*nic    // in order of Add
	free     []uint32  // slots, longest unused first
	attacher *attacher

	out        NICTraffic
	trafficCPU []gen.TCXTraffic   // of one NIC
	sizesCPU   []gen.TCXHistogram // the same
	dropsBuf   []uint64           // the same: the sum, then by reason
}

// nic is a NIC that is followed.
type nic struct {
	id   uint32
	slot uint32
	*attachment
}

// LoadTCX loads the programs, detached. The error says what is missing:
// [ErrNoBTF], [ErrNoCapability], [ErrNoNetAdmin] or [ErrRefused].
func LoadTCX(opts TCXOptions) (*TCX, error) {
	cpus, err := ebpf.PossibleCPU()
	if err != nil {
		return nil, fmt.Errorf("load tcx: count CPUs: %w", err)
	}
	t := &TCX{trafficCPU: make([]gen.TCXTraffic, cpus), sizesCPU: make([]gen.TCXHistogram, cpus)}
	for slot := range uint32(maxNICs) {
		t.free = append(t.free, slot)
	}
	if opts.Drops {
		t.reasons, t.dropsErr = dropReasons()
	}
	err = t.load(opts)
	if err != nil && len(t.reasons) > 0 {
		// The kernel may lack no more than the reason.
		t.dropsErr, t.reasons = err, nil
		err = t.load(opts)
	}
	if err == nil {
		progs := [directions]*ebpf.Program{incoming: t.objs.ToGuest, outgoing: t.objs.FromGuest}
		if t.attacher, err = newAttacher(progs, opts.Clsact); err != nil {
			t.objs.Close()
		}
	}
	if err != nil {
		return nil, fmt.Errorf("load tcx: %w", err)
	}
	return t, nil
}

// load loads the programs, that for drops only if there are reasons.
func (t *TCX) load(opts TCXOptions) error {
	spec, err := gen.LoadTCX()
	if err != nil {
		return err
	}
	slots := uint32(maxNICs * len(t.trafficCPU))
	spec.Maps[gen.TCXMapTraffics].MaxEntries = slots
	variables := map[string]uint32{gen.TCXVarCpus: uint32(len(t.trafficCPU))}
	if opts.Sizes {
		spec.Maps[gen.TCXMapSizes].MaxEntries = slots
		variables[gen.TCXVarCountSizes] = 1
	}
	if n := len(t.reasons); n > 0 {
		spec.Maps[gen.TCXMapDrops].MaxEntries = uint32(maxNICs * (n + 1))
		variables[gen.TCXVarReasons] = uint32(n)
	}
	for name, value := range variables {
		if err := spec.Variables[name].Set(value); err != nil {
			return err
		}
	}
	if len(t.reasons) > 0 {
		err = spec.LoadAndAssign(&t.objs, nil)
	} else {
		var some struct {
			FromGuest *ebpf.Program `ebpf:"from_guest"`
			ToGuest   *ebpf.Program `ebpf:"to_guest"`
			gen.TCXMaps
			gen.TCXVariables
		}
		err = spec.LoadAndAssign(&some, nil)
		t.objs.FromGuest, t.objs.ToGuest = some.FromGuest, some.ToGuest
		t.objs.TCXMaps, t.objs.TCXVariables = some.TCXMaps, some.TCXVariables
	}
	if err != nil {
		return explainNet(err)
	}
	t.maybe = newMaybe(t.objs.Maybe)
	if t.traffics, err = t.objs.Traffics.Memory(); err == nil && opts.Sizes {
		t.sizes, err = t.objs.Sizes.Memory()
	}
	if err == nil && len(t.reasons) > 0 {
		t.drops, err = t.objs.Drops.Memory()
		t.dropsBuf = make([]uint64, len(t.reasons)+1)
	}
	if err != nil {
		t.objs.Close()
		return fmt.Errorf("map the memory: %w", err)
	}
	return nil
}

// NeedsNetAdmin says whether adding an interface takes CAP_NET_ADMIN.
func (t *TCX) NeedsNetAdmin() bool {
	return t.attacher.tc != nil
}

// Reasons returns the kernel's names for why it drops packets, such as
// full_ring, and "other" for those that it gives no name here. It is empty
// where they are not counted; the error says why, where they should be.
func (t *TCX) Reasons() ([]string, error) {
	return t.reasons, t.dropsErr
}

// Attach makes the programs run, before long, for all NICs.
func (t *TCX) Attach() error {
	if t.objs.Dropped != nil && t.dropLink == nil {
		l, err := link.AttachTracing(link.TracingOptions{Program: t.objs.Dropped})
		if err != nil {
			return fmt.Errorf("attach kfree_skb: %w", explain(err))
		}
		t.dropLink = l
	}
	t.attacher.turn(true)
	return nil
}

// Detach stops the programs, before long. What was counted stays.
func (t *TCX) Detach() error {
	t.attacher.turn(false)
	if t.dropLink == nil {
		return nil
	}
	err := t.dropLink.Close()
	t.dropLink = nil
	return err
}

// Add follows the interface with that index as id, from zero. The error is
// [ErrTooManyNICs] or the kernel's. Attaching follows; if it failed for an id that
// is followed already, it is tried again.
func (t *TCX) Add(id uint32, index int) error {
	for _, n := range t.nics {
		if n.id == id {
			t.attacher.retry(n.attachment)
			return nil
		}
	}
	if len(t.free) == 0 {
		return fmt.Errorf("follow interface %d: %w", index, ErrTooManyNICs)
	}
	slot := t.free[0]
	err := t.clear(slot)
	if err == nil {
		err = t.objs.Nics.Update(uint32(index), slot, ebpf.UpdateNoExist)
	}
	if err != nil {
		return fmt.Errorf("follow interface %d: %w", index, err)
	}
	t.free = t.free[1:]
	t.nics = append(t.nics, &nic{id, slot, t.attacher.add(index)})
	return t.maybe.add(index)
}

// Remove forgets id, if it is there. Its interface may be gone already.
func (t *TCX) Remove(id uint32) error {
	i := slices.IndexFunc(t.nics, func(n *nic) bool { return n.id == id })
	if i < 0 {
		return nil
	}
	n := t.nics[i]
	t.nics = slices.Delete(t.nics, i, i+1)
	t.free = append(t.free, n.slot)
	t.attacher.remove(n.attachment)
	return errors.Join(t.maybe.remove(n.index), t.objs.Nics.Delete(uint32(n.index)))
}

// Wait returns when the programs are attached or detached as asked, or after
// limit. The error joins why some could not be: [ErrNoInterface],
// [ErrNoNetAdmin] or the kernel's reason.
func (t *TCX) Wait(limit time.Duration) error {
	return t.attacher.wait(limit)
}

// clear zeroes what the slot's last NIC has counted.
func (t *TCX) clear(slot uint32) error {
	clear(t.trafficCPU)
	clear(t.sizesCPU)
	clear(t.dropsBuf)
	_, err := t.traffics.WriteAt(bytesOf(t.trafficCPU), offset(slot, t.trafficCPU))
	if err == nil && t.sizes != nil {
		_, err = t.sizes.WriteAt(bytesOf(t.sizesCPU), offset(slot, t.sizesCPU))
	}
	if err == nil && t.drops != nil {
		_, err = t.drops.WriteAt(bytesOf(t.dropsBuf), offset(slot, t.dropsBuf))
	}
	return err
}

// offset is where a slot begins in a map that holds one of s for each.
func offset[T any](slot uint32, s []T) int64 {
	return int64(slot) * int64(len(bytesOf(s)))
}

// Read calls emit with what was counted of each NIC that the programs have
// been attached to, in order of Add. n is valid until emit returns. It does not
// allocate.
func (t *TCX) Read(emit func(id uint32, n *NICTraffic)) error {
	for _, n := range t.nics {
		if !n.counted.Load() {
			continue
		}
		if err := t.read(n.slot); err != nil {
			return fmt.Errorf("read tcx: %w", err)
		}
		emit(n.id, &t.out)
	}
	return nil
}

func (t *TCX) read(slot uint32) error {
	t.out = NICTraffic{}
	ways := [directions]*Traffic{incoming: &t.out.Incoming, outgoing: &t.out.Outgoing}
	if _, err := t.traffics.ReadAt(bytesOf(t.trafficCPU), offset(slot, t.trafficCPU)); err != nil {
		return err
	}
	for cpu := range t.trafficCPU {
		for way, to := range ways {
			to.Packets += t.trafficCPU[cpu].Packets[way]
			to.Bytes += t.trafficCPU[cpu].Bytes[way]
			to.Segments += t.trafficCPU[cpu].Segments[way]
		}
	}
	if t.sizes != nil {
		if _, err := t.sizes.ReadAt(bytesOf(t.sizesCPU), offset(slot, t.sizesCPU)); err != nil {
			return err
		}
		for cpu := range t.sizesCPU {
			for way, to := range ways {
				for i, n := range t.sizesCPU[cpu].Packets[way] {
					to.Sizes[i] += n
				}
			}
		}
	}
	if t.drops == nil {
		return nil
	}
	// The first is their sum. Most NICs have none, and then the rest need not be read.
	at := offset(slot, t.dropsBuf)
	if _, err := t.drops.ReadAt(bytesOf(t.dropsBuf[:1]), at); err != nil || t.dropsBuf[0] == 0 {
		return err
	}
	if _, err := t.drops.ReadAt(bytesOf(t.dropsBuf), at); err != nil {
		return err
	}
	t.out.Drops = t.dropsBuf[1:]
	return nil
}

// Followed returns how many NICs are followed, and how many can be.
func (t *TCX) Followed() (n, limit int) {
	return len(t.nics), maxNICs
}

// Misses returns how many drops the kernel has not shown to the program
// because it was running already.
func (t *TCX) Misses() (uint64, error) {
	if t.objs.Dropped == nil {
		return 0, nil
	}
	return misses(t.objs.Dropped)
}

// Close detaches and unloads the programs.
func (t *TCX) Close() error {
	return errors.Join(t.Detach(), t.attacher.close(), t.objs.Close())
}

// dropReasons names the numbers that the kernel gives for a drop, from 1 on,
// as in SKB_DROP_REASON_NO_SOCKET: no_socket. The last is for all other numbers.
func dropReasons() ([]string, error) {
	kernel, err := btf.LoadKernelSpec()
	if err != nil {
		return nil, err
	}
	var enum *btf.Enum
	if err := kernel.TypeByName("skb_drop_reason", &enum); err != nil {
		return nil, fmt.Errorf("the kernel does not tell why it drops packets (Linux 5.17): %w", err)
	}
	return reasonNames(enum.Values), nil
}

// maxReasons bounds what a kernel may name; Linux 6.18 has about 130.
const maxReasons = 1024

func reasonNames(values []btf.EnumValue) []string {
	var names []string
	for _, v := range values {
		name, named := strings.CutPrefix(v.Name, "SKB_DROP_REASON_")
		// The last two name no reason; the rest are of other parts of the kernel.
		if !named || name == "MAX" || name == "SUBSYS_MASK" || v.Value == 0 || v.Value >= maxReasons {
			continue
		}
		for uint64(len(names)) < v.Value {
			names = append(names, "")
		}
		names[v.Value-1] = strings.ToLower(name)
	}
	for i, name := range names {
		if name == "" {
			names[i] = "reason_" + strconv.Itoa(i+1)
		}
	}
	return append(names, unnamedReason)
}

// explainAttach says what an error of attaching a loaded program to an
// interface means.
func explainAttach(err error) error {
	switch {
	case errors.Is(err, unix.ENODEV):
		return ErrNoInterface
	case errors.Is(err, unix.EPERM):
		if has, capErr := ownCapabilities(); capErr != nil || !has(unix.CAP_NET_ADMIN) {
			return cmp.Or(capErr, errNoNetAdmin())
		}
	}
	return err
}

func errNoNetAdmin() error {
	return fmt.Errorf("%w: run as root, or grant it to the service (AmbientCapabilities=)", ErrNoNetAdmin)
}

// explainNet is explain for programs that see packets.
func explainNet(err error) error {
	if errors.Is(err, unix.EPERM) {
		has, capErr := ownCapabilities()
		if capErr != nil {
			return capErr
		}
		if !has(unix.CAP_NET_ADMIN) && (has(unix.CAP_SYS_ADMIN) || has(unix.CAP_BPF) && has(unix.CAP_PERFMON)) {
			return errNoNetAdmin()
		}
	}
	return explain(err)
}
