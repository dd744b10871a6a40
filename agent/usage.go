package agent

import (
	"strconv"

	"github.com/kvmeter/kvmeter/agent/state"
	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/sample"
)

// Meters that a UsageReader counts of a process, by index into keptUsage.last:
// new ones go to the end.
const (
	iCPU = iota
	iProcess
	iWait
	iEmulator
	iIOThread
	iWorker
	iVHost
	iExited
	iDiskRead
	iDiskWrite
	iSwitches
	iEmulatorWait
	iIOThreadWait
	iWorkerWait
	iVHostWait
	iEmulatorSwitches
	iIOThreadSwitches
	iWorkerSwitches
	iVHostSwitches
	usageCount
)

var usageMeters = [usageCount]*sample.Meter{
	sample.CPU, sample.CPUProcess, sample.CPUWait, sample.CPUEmulator, sample.CPUIOThread,
	sample.CPUWorker, sample.CPUVhost, sample.CPUExited, sample.DiskHostReadBytes, sample.DiskHostWriteBytes,
	sample.CPUSwitches, sample.CPUEmulatorWait, sample.CPUIOThreadWait, sample.CPUWorkerWait, sample.CPUVhostWait,
	sample.CPUEmulatorSwitches, sample.CPUIOThreadSwitches, sample.CPUWorkerSwitches, sample.CPUVhostSwitches,
}

// classMeters says which meters a class of threads counts into.
var classMeters = [bpf.Classes]struct{ run, wait, switches int }{
	bpf.VCPU:     {iCPU, iWait, iSwitches},
	bpf.Emulator: {iEmulator, iEmulatorWait, iEmulatorSwitches},
	bpf.IOThread: {iIOThread, iIOThreadWait, iIOThreadSwitches},
	bpf.Worker:   {iWorker, iWorkerWait, iWorkerSwitches},
	bpf.VHost:    {iVHost, iVHostWait, iVHostSwitches},
}

// Meters of a vCPU, by index into keptVCPU.last.
const (
	iVCPURun = iota
	iVCPUWait
	iVCPUSwitches
	vcpuCount
)

var vcpuMeters = [vcpuCount]*sample.Meter{sample.VCPURun, sample.VCPUWait, sample.VCPUSwitches}

// maxVCPUs bounds the vCPUs of a domain that have rows of their own.
const maxVCPUs = 4096

// usageState is what was published of a process, and what it was made of.
type usageState struct {
	*keptUsage
	kept  *state.File
	owner sample.Incarnation
	uuid  string // of the domain
	block *state.Block
	has   uint32       // bits: which meters the last reading had
	vcpus []*vcpuState // by their numbers; nil: never seen
	round uint64       // of advance

	addWait bool // schedWait is part of cpu: cpu_definition ceilometer
}

// keptUsage outlives the agent: words of a block, of which new ones go to the end.
type keptUsage struct {
	split uint64 // 1: exited, run, wait and switches are of a reading
	had   uint64 // bits: which meters any reading had
	vcpus uint64 // one more than the greatest number of a vCPU

	// As last read.
	exited              uint64
	run, wait, switches [bpf.Classes]uint64

	// What a class has, beside its live threads: of those that left it, less what
	// others had brought along.
	ran, waited, switched [bpf.Classes]int64

	last [usageCount]uint64 // published

	// What the vCPU threads waited by libvirt's account, where it is part of cpu.
	schedWait uint64
}

// vcpuState is the same of one vCPU.
type vcpuState struct {
	*keptVCPU
	block    *state.Block
	resource string // id of its samples
	sent     int64  // time of the last sample or gap, µs since the epoch; 0: none
	round    uint64 // of the last reading that had it
	dirty    bool   // something has changed since the last commit
}

// keptVCPU outlives the agent, as keptUsage.
type keptVCPU struct {
	tid  uint64 // of its thread, as last read
	left uint64 // 1: the thread has ended, or is no vCPU's any more

	run, wait, switches   uint64 // of the thread, as last read
	ran, waited, switched uint64 // of threads that left

	last [vcpuCount]uint64 // published

	schedTID, schedWait uint64 // the thread's wait by libvirt's account, as last read
}

func newUsageState(kept *state.File, owner sample.Incarnation, uuid string) usageState {
	s := usageState{kept: kept, owner: owner, uuid: uuid, block: kept.Block(owner, state.KeyOf("usage"), state.Words[keptUsage]())}
	s.keptUsage = state.View[keptUsage](s.block)
	for i := range min(s.keptUsage.vcpus, maxVCPUs) {
		s.vcpu(int(i))
	}
	return s
}

// vcpu returns the state of the vCPU of that number.
func (s *usageState) vcpu(number int) *vcpuState {
	for len(s.vcpus) <= number {
		s.vcpus = append(s.vcpus, nil)
	}
	v := s.vcpus[number]
	if v == nil {
		n := strconv.Itoa(number)
		v = &vcpuState{resource: s.uuid + "-vcpu" + n, block: s.kept.Block(s.owner, state.KeyOf("vcpu", n), state.Words[keptVCPU]())}
		v.keptVCPU = state.View[keptVCPU](v.block)
		s.vcpus[number] = v
		s.keptUsage.vcpus = max(s.keptUsage.vcpus, uint64(number)+1)
	}
	return v
}

// departed is what threads had counted, as last read, that left their class.
type departed struct {
	run, wait, switches uint64
}

// advance takes over a reading. A published number never decreases: where a
// reading is lower it is held, and held is called with the meter's index.
//
// The time of a class shrinks when one of its threads exits; the kernel then
// counts it as the process's. It stays in its class here, so that cpu goes on
// growing after a vCPU was unplugged, and "exited" is what is left: time after
// the last reading of threads that have exited, and of those never seen alive.
// A thread that is renamed leaves in its old class what it counted there.
//
// The classes and "exited" always add up to the process. Where they would be
// more (a running slice was estimated too long), the class that grew most waits.
func (s *usageState) advance(u *bpf.Usage, vcpus []bpf.VCPUUsage, held func(meter int)) {
	s.has = 0
	s.round++
	s.set(iProcess, u.Process, held)
	if u.HasSplit {
		gone := s.departed(u, vcpus)
		renamed := s.advanceRun(u, &gone, held)
		if u.HasWait {
			s.advanceWait(u, &gone, renamed, held)
		}
		s.run, s.exited, s.split = u.Run, u.Exited, 1
	}
	if u.HasIO {
		s.set(iDiskRead, u.ReadBytes, held)
		s.set(iDiskWrite, u.WriteBytes, held)
	}
	s.had |= uint64(s.has)
	// In this order: after a kill in between, threads that have exited are found
	// missing again, but their time is no more.
	s.block.Commit()
	for _, v := range s.vcpus {
		if v != nil && v.dirty {
			v.dirty = false
			v.block.Commit()
		}
	}
}

// value is what is published of a meter.
func (s *usageState) value(i int) uint64 {
	if i == iCPU && s.addWait {
		return s.last[iCPU] + s.schedWait
	}
	return s.last[i]
}

// advanceSched takes over what the vCPU threads waited by libvirt's account. A
// thread that ended meanwhile keeps what it had.
func (s *usageState) advanceSched(vcpus []bpf.VCPUUsage, wait func(tid uint32) (uint64, error)) {
	s.addWait = true
	for i := range vcpus {
		x := &vcpus[i]
		if x.Index < 0 || x.Index >= maxVCPUs {
			continue
		}
		ns, err := wait(x.TID)
		if err != nil {
			continue
		}
		v := s.vcpu(x.Index)
		if v.schedTID != uint64(x.TID) {
			v.schedTID, v.schedWait = uint64(x.TID), 0
		}
		s.schedWait += less(v.schedWait, ns)
		v.schedWait = max(v.schedWait, ns)
		v.block.Commit()
	}
	s.block.Commit()
}

func (s *usageState) set(i int, value uint64, held func(meter int)) {
	s.has |= 1 << i
	if value < s.last[i] {
		held(i)
		return
	}
	s.last[i] = value
}

// departed returns what threads that left their class had counted there. Of
// vCPUs each thread is known; of another class only its sum, so that what left
// is seen only as far as it is more than what the others have counted since.
func (s *usageState) departed(u *bpf.Usage, vcpus []bpf.VCPUUsage) (gone [bpf.Classes]departed) {
	of, known := s.advanceVCPUs(u, vcpus)
	if s.split == 0 {
		return gone
	}
	for c := range gone {
		if c == int(bpf.VCPU) && known {
			gone[c] = of
			continue
		}
		gone[c] = departed{less(u.Run[c], s.run[c]), less(u.Wait[c], s.wait[c]), less(u.Switches[c], s.switches[c])}
	}
	return gone
}

// less returns how far now is below what was.
func less(now, was uint64) uint64 {
	return was - min(now, was)
}

// advanceVCPUs takes over the vCPUs, and returns what threads that left had
// counted. known is false if not all threads could be told apart.
func (s *usageState) advanceVCPUs(u *bpf.Usage, vcpus []bpf.VCPUUsage) (gone departed, known bool) {
	known = int(u.VCPUs) == len(vcpus)
	for i := range vcpus {
		x := &vcpus[i]
		if x.Index < 0 || x.Index >= maxVCPUs {
			known = false
			continue
		}
		v := s.vcpu(x.Index)
		if v.round == s.round {
			known = false // two threads of one name
			continue
		}
		v.round = s.round
		if v.left == 0 && v.tid == uint64(x.TID) && v.run == x.Run && v.switches == x.Switches && x.Slice == 0 {
			continue // it has not run
		}
		v.dirty = true
		same := v.tid == uint64(x.TID) && x.Run >= v.run
		switch {
		case same && v.left != 0: // it was renamed, and is back
			v.ran, v.waited, v.switched = v.ran-v.run, v.waited-v.wait, v.switched-v.switches
		case !same && v.left == 0:
			v.leave(&gone)
		}
		v.tid, v.left = uint64(x.TID), 0
		v.run, v.wait, v.switches = x.Run, x.Wait, x.Switches
		for m, value := range [vcpuCount]uint64{v.ran + v.run + x.Slice, v.waited + v.wait, v.switched + v.switches} {
			v.last[m] = max(v.last[m], value)
		}
	}
	for _, v := range s.vcpus {
		if v != nil && v.round != s.round && v.left == 0 {
			v.leave(&gone)
		}
	}
	return gone, known
}

// leave keeps what the vCPU's thread had counted when it was last read.
func (v *vcpuState) leave(gone *departed) {
	if v.tid == 0 {
		return // it never had one
	}
	v.left, v.dirty = 1, true
	v.ran, v.waited, v.switched = v.ran+v.run, v.waited+v.wait, v.switched+v.switches
	gone.run, gone.wait, gone.switches = gone.run+v.run, gone.wait+v.wait, gone.switches+v.switches
}

// advanceRun takes over the times of the classes. It returns the class that
// threads were renamed to, or -1.
func (s *usageState) advanceRun(u *bpf.Usage, gone *[bpf.Classes]departed, held func(meter int)) (renamed int) {
	ended := s.ended(u)
	away := uint64(0) // what left a class, but not the process
	var from [bpf.Classes]uint64
	for c := range gone {
		n := min(gone[c].run, ended)
		ended -= n
		s.ran[c] += int64(n)
		from[c] = gone[c].run - n
		away += from[c]
	}
	room := s.last[iProcess] - s.last[iExited]
	for c := range classMeters {
		room -= s.last[classMeters[c].run]
	}
	renamed = -1
	growth, sum := s.growth(u)
	if away = min(away, less(room, sum)); away > 0 {
		renamed = largest(&growth)
		for c := range from {
			n := min(from[c], away)
			away -= n
			s.ran[c] += int64(n)
			s.ran[renamed] -= int64(n)
		}
		growth, sum = s.growth(u)
	}
	for sum > room {
		c := largest(&growth)
		n := min(growth[c], sum-room)
		growth[c] -= n
		sum -= n
	}
	for c := range classMeters {
		i := classMeters[c].run
		s.has |= 1 << i
		if s.target(u, c) < s.last[i] {
			held(i)
		}
		s.last[i] += growth[c]
	}
	s.has |= 1 << iExited
	s.last[iExited] += room - sum
	return renamed
}

// ended returns what threads that ended since the last reading had run, in all.
func (s *usageState) ended(u *bpf.Usage) uint64 {
	if s.split == 0 {
		return 0
	}
	return u.Exited - min(s.exited, u.Exited)
}

// target is the time of a class by this reading.
func (s *usageState) target(u *bpf.Usage, class int) uint64 {
	return plus(u.Run[class]+u.Slice[class], s.ran[class])
}

func plus(n uint64, m int64) uint64 {
	return uint64(max(0, int64(n)+m))
}

// growth is by how much the classes would grow.
func (s *usageState) growth(u *bpf.Usage) (growth [bpf.Classes]uint64, sum uint64) {
	for c := range growth {
		last := s.last[classMeters[c].run]
		growth[c] = max(s.target(u, c), last) - last
		sum += growth[c]
	}
	return growth, sum
}

func largest(growth *[bpf.Classes]uint64) int {
	most := 0
	for c := range growth {
		if growth[c] > growth[most] {
			most = c
		}
	}
	return most
}

// advanceWait takes over the waits and switches of the classes. The kernel
// keeps neither of threads that have ended.
func (s *usageState) advanceWait(u *bpf.Usage, gone *[bpf.Classes]departed, renamed int, held func(meter int)) {
	for c := range gone {
		// Without either, a kill had cut the reading short that first missed them.
		if s.ended(u) > 0 || renamed >= 0 {
			s.waited[c] += int64(gone[c].wait)
			s.switched[c] += int64(gone[c].switches)
		}
		if renamed >= 0 && s.ended(u) == 0 {
			s.waited[renamed] -= int64(gone[c].wait)
			s.switched[renamed] -= int64(gone[c].switches)
		}
	}
	for c := range classMeters {
		s.set(classMeters[c].wait, plus(u.Wait[c], s.waited[c]), held)
		s.set(classMeters[c].switches, plus(u.Switches[c], s.switched[c]), held)
	}
	s.wait, s.switches = u.Wait, u.Switches
}
