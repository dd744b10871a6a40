package bpf

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/cilium/ebpf/btf"

	"github.com/kvmeter/kvmeter/gen"
)

// OriginKVM is the name of KVM's own statistics in samples.
const OriginKVM = "kvm"

// ErrNoKVM says that the kernel has no KVM, or its module is not loaded (yet)
// or comes without BTF.
var ErrNoKVM = errors.New("the kernel tells nothing of KVM's types (no module kvm, or built without CONFIG_DEBUG_INFO_BTF_MODULES)")

// MaxKVMFields is MAX_KVM_FIELDS in kvm.bpf.c.
const MaxKVMFields = 64

// maxKVMStat is KVM_STAT_BYTES in kvm.bpf.c.
const maxKVMStat = 4096

// KVMUsage is what KVM has counted of a process's vCPUs since they were made.
type KVMUsage struct {
	// VCPUs is how many there are; 0: the process has none, or another accelerator.
	VCPUs uint32
	// Counts are the sums over them, in the order of [KVM.Fields].
	Counts [MaxKVMFields]uint64
	// Err is nil, or why the process could not be read; then the rest is zero.
	Err error
}

// KVM reads KVM's own statistics of vCPUs by a BPF program, from the kernel's
// memory: QEMU is not asked. It is for one goroutine at a time.
type KVM struct {
	objs     gen.KVMObjects
	requests array[gen.KVMKvmRequest]
	usages   array[gen.KVMKvmUsage]
	fields   []string
	run      gen.KVMKvmRun
	runner   *runner[gen.KVMKvmRun]
	stats    Stats
	scans    uint64
}

// LoadKVM loads the program. The privileges that it and Read need, and its
// errors, are those of [LoadWalk].
func LoadKVM() (*KVM, error) {
	k := &KVM{}
	if err := k.load(); err != nil {
		_ = k.Close()
		return nil, fmt.Errorf("load kvm: %w", err)
	}
	return k, nil
}

func (k *KVM) load() error {
	if err := checkPIDNamespace(); err != nil {
		return err
	}
	if err := gen.LoadKVMObjects(&k.objs, nil); err != nil {
		return explain(err)
	}
	var err error
	if k.requests, err = mapArray[gen.KVMKvmRequest](k.objs.KvmRequests); err != nil {
		return err
	}
	if k.usages, err = mapArray[gen.KVMKvmUsage](k.objs.KvmUsages); err != nil {
		return err
	}
	k.runner = newRunner[gen.KVMKvmRun](k.objs.Kvm.FD())
	return nil
}

// Origin returns [OriginKVM].
func (k *KVM) Origin() string {
	return OriginKVM
}

// Fields names what [KVMUsage.Counts] are, as the kernel does: exits, then exits
// by kind and halt_poll_success_ns and halt_poll_fail_ns, as this kernel and
// architecture have them. It is empty until Read has found KVM.
func (k *KVM) Fields() []string {
	return k.fields
}

// Read fills out[i] with what KVM has counted for procs[i], which has vcpus[i]
// vCPUs; 0: that is not known. A process that can't be read has its Err set and
// costs no other; the error of Read itself, such as [ErrNoKVM], means that
// nothing could be read.
func (k *KVM) Read(ctx context.Context, procs []Proc, vcpus []uint32, out []KVMUsage) error {
	if len(out) < len(procs) || len(vcpus) < len(procs) {
		return fmt.Errorf("read kvm: room for %d of %d processes", min(len(out), len(vcpus)), len(procs))
	}
	if err := k.find(); err != nil {
		return fmt.Errorf("read kvm: %w", err)
	}
	k.stats.Reads++
	k.stats.Processes += uint64(len(procs))
	for i := 0; i < len(procs); i += maxProcesses {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("read kvm: %w", err)
		}
		end := min(len(procs), i+maxProcesses)
		if err := k.read(procs[i:end], vcpus[i:end], out[i:end]); err != nil {
			return fmt.Errorf("read kvm: %w", err)
		}
	}
	return nil
}

func (k *KVM) read(procs []Proc, vcpus []uint32, out []KVMUsage) error {
	for i, p := range procs {
		k.requests.values[i] = gen.KVMKvmRequest{Pid: p.key(), Vcpus: vcpus[i], StartTicks: p.StartTicks}
	}
	k.run.Count = uint32(len(procs))
	if err := k.runner.run(&k.run); err != nil {
		return err
	}
	for i := range procs {
		u := &k.usages.values[i]
		if err := errOf(u.Status); err != nil {
			k.stats.Failed++
			out[i] = KVMUsage{Err: err}
			continue
		}
		k.scans += uint64(u.Scans)
		out[i] = KVMUsage{VCPUs: u.Vcpus, Counts: u.Sums}
	}
	return nil
}

// Stats returns what the reader has met so far. Retries are processes whose
// files were looked through for vCPUs.
func (k *KVM) Stats() Stats {
	s := k.stats
	s.Retries = k.scans
	return s
}

// Close unloads the program.
func (k *KVM) Close() error {
	return errors.Join(k.requests.unmap(), k.usages.unmap(), k.objs.Close())
}

// find looks where KVM keeps its counters, unless that is known.
func (k *KVM) find() error {
	if k.fields != nil {
		return nil
	}
	vcpu, err := kvmVCPU()
	if err != nil {
		return err
	}
	layout, fields, err := kvmLayout(vcpu)
	if err != nil {
		return err
	}
	k.run.Layout, k.fields = layout, fields
	return nil
}

// kvmVCPU returns the type of KVM's vCPUs, from the kernel or its module.
func kvmVCPU() (*btf.Struct, error) {
	var vcpu *btf.Struct
	kernel, err := btf.LoadKernelSpec()
	if err != nil {
		return nil, ErrNoBTF
	}
	if kernel.TypeByName("kvm_vcpu", &vcpu) == nil && member(vcpu, "stat") != nil {
		return vcpu, nil
	}
	if _, err := os.Stat("/sys/kernel/btf/kvm"); err != nil {
		return nil, ErrNoKVM
	}
	module, err := btf.LoadKernelModuleSpec("kvm")
	if err != nil {
		return nil, fmt.Errorf("read the types of the module kvm: %w", err)
	}
	if err := module.TypeByName("kvm_vcpu", &vcpu); err != nil {
		return nil, fmt.Errorf("the module kvm: %w", err)
	}
	return vcpu, nil
}

func member(s *btf.Struct, name string) *btf.Member {
	for i := range s.Members {
		if s.Members[i].Name == name {
			return &s.Members[i]
		}
	}
	return nil
}

// kvmLayout says where the counters of a vCPU are.
func kvmLayout(vcpu *btf.Struct) (layout gen.KVMKvmLayout, fields []string, err error) {
	at := member(vcpu, "stat")
	if at == nil {
		return layout, nil, errors.New("struct kvm_vcpu has no statistics")
	}
	stat, ok := btf.UnderlyingType(at.Type).(*btf.Struct)
	if !ok || stat.Size > maxKVMStat {
		return layout, nil, fmt.Errorf("the statistics of struct kvm_vcpu are of no type that is known: %v", at.Type)
	}
	layout.Stat, layout.Size = at.Offset.Bytes(), stat.Size
	var add func(s *btf.Struct, base uint32)
	add = func(s *btf.Struct, base uint32) {
		for _, m := range s.Members {
			offset := base + m.Offset.Bytes()
			switch t := btf.UnderlyingType(m.Type).(type) {
			case *btf.Struct:
				add(t, offset)
			case *btf.Int:
				if t.Size == 8 && wantedOfKVM(m.Name) && len(fields) < MaxKVMFields {
					layout.At[len(fields)] = offset
					fields = append(fields, m.Name)
				}
			}
		}
	}
	add(stat, 0)
	layout.Fields = uint32(len(fields))
	if len(fields) == 0 {
		return layout, nil, errors.New("the statistics of struct kvm_vcpu have no exits")
	}
	return layout, fields, nil
}

// wantedOfKVM says which of KVM's counters are read.
func wantedOfKVM(name string) bool {
	return strings.Contains(name, "exit") || name == "halt_poll_success_ns" || name == "halt_poll_fail_ns"
}

// KVMExitKind returns the kind of exits that one of [KVM.Fields] counts: io for
// io_exits, wfe for wfe_exit_stat, mmio_user for mmio_exit_user. It is empty for
// the sum of all and for what counts no exits.
func KVMExitKind(field string) string {
	var kind []string
	exits := false
	for word := range strings.SplitSeq(field, "_") {
		switch {
		case word == "exit", word == "exits":
			exits = true
		case word != "stat":
			kind = append(kind, word)
		}
	}
	if !exits {
		return ""
	}
	return strings.Join(kind, "_")
}
