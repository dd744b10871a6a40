package lab

import (
	"encoding/hex"
	"encoding/xml"
	"fmt"
	"path/filepath"
	"strings"
	"text/template"

	"github.com/google/uuid"
)

// Kind of a guest.
type Kind string

const (
	// Linux guests boot Debian's cloud kernel under TCG and obey [Guest.Exec].
	Linux Kind = "linux"
	// KVM guests run a ROM of a few instructions: they have real vCPU threads
	// and do what their mode says from their start on.
	KVM Kind = "kvm"
)

// Modes of KVM guests.
var Modes = []string{"idle", "burn", "pulse", "disk"}

// DiskReads is the number of requests of 512 bytes that a guest in mode disk
// makes, all reads, before it halts.
const DiskReads = 200

// GuestSpec is what a guest is made of. The zero value is a Linux guest with one
// vCPU, one raw disk of 64 MiB and one NIC.
type GuestSpec struct {
	Kind Kind
	// Mode of a KVM guest: idle (default), burn (all vCPUs), pulse (the first
	// vCPU wakes 18.2 times a second) or disk (reads, see [DiskReads]).
	Mode      string
	VCPUs     int
	MemoryMiB int
	// Disks are vda, vdb, … of a Linux guest (virtio) and hda, … of a KVM guest
	// (IDE, at most four). Nil means one; empty and not nil means none.
	Disks []Disk
	// NICs is the number of virtio NICs, at most 8; 0 means one, -1 means none.
	NICs int
	// Name is the display name that Nova gives; Flavor, User, Project and Image
	// are in its metadata too. The ids of user and project derive from the names,
	// so the same name is the same user in every lab.
	Name, Flavor, User, Project string
	// Edits are pairs of texts: of the domain's XML that the rest makes, the first
	// of each is replaced by the second.
	Edits []string
}

// Disk is one disk of a guest.
type Disk struct {
	Format  string // raw (default) or qcow2
	Cache   string // none (default), writeback, directsync, writethrough, unsafe
	AIO     string // native (default where Cache bypasses the page cache), threads, io_uring
	SizeMiB int    // default 64; a file with holes
}

// withDefaults fills in and checks a spec.
func (s GuestSpec) withDefaults(number int) (GuestSpec, error) {
	def := func(v *string, to string) {
		if *v == "" {
			*v = to
		}
	}
	def((*string)(&s.Kind), string(Linux))
	memory, maxDisks := 96, 26
	switch s.Kind {
	case Linux:
		if s.Mode != "" {
			return s, fmt.Errorf("mode %q is for KVM guests; a Linux guest is told what to do by Exec", s.Mode)
		}
	case KVM:
		memory, maxDisks = 16, 4
		def(&s.Mode, "idle")
		if !contains(Modes, s.Mode) {
			return s, fmt.Errorf("no mode %q of KVM guests: there are %s", s.Mode, strings.Join(Modes, ", "))
		}
	default:
		return s, fmt.Errorf("no kind %q of guests: there are linux and kvm", s.Kind)
	}
	if s.VCPUs == 0 {
		s.VCPUs = 1
	}
	if s.MemoryMiB == 0 {
		s.MemoryMiB = memory
	}
	if s.NICs == 0 {
		s.NICs = 1
	}
	if len(s.Edits)%2 != 0 {
		return s, fmt.Errorf("%d edits are no pairs of texts", len(s.Edits))
	}
	if s.NICs > 8 {
		return s, fmt.Errorf("%d NICs are too many: a guest has at most 8", s.NICs)
	}
	if s.Disks == nil {
		s.Disks = []Disk{{}}
	}
	if len(s.Disks) > maxDisks {
		return s, fmt.Errorf("%d disks are too many: a %s guest has at most %d", len(s.Disks), s.Kind, maxDisks)
	}
	s.Disks = append([]Disk(nil), s.Disks...)
	for i := range s.Disks {
		d := &s.Disks[i]
		def(&d.Format, "raw")
		if d.Format != "raw" && d.Format != "qcow2" {
			return s, fmt.Errorf("no disk format %q: there are raw and qcow2", d.Format)
		}
		def(&d.Cache, "none")
		aio := "threads"
		if d.Cache == "none" || d.Cache == "directsync" {
			aio = "native"
		}
		def(&d.AIO, aio)
		if d.SizeMiB == 0 {
			d.SizeMiB = 64
		}
	}
	def(&s.Name, fmt.Sprintf("vm%d", number))
	def(&s.Flavor, "m1.nano")
	def(&s.User, "demo")
	def(&s.Project, fmt.Sprintf("project%d", number%5))
	return s, nil
}

func contains(list []string, want string) bool {
	for _, v := range list {
		if v == want {
			return true
		}
	}
	return false
}

// identity is what tells a guest from all others, of this lab and of others.
type identity struct {
	Name   string // as Nova names it for libvirt: instance-%08x
	UUID   string // begins with the lab's id
	Number int
}

func (l *Lab) identity(number int) identity {
	return identity{
		Name:   fmt.Sprintf("instance-%08x", number),
		UUID:   fmt.Sprintf("%s-%04x-4000-8000-%012x", l.id, number>>16, number),
		Number: number,
	}
}

// NIC is one NIC of a guest.
type NIC struct {
	Tap  string // the host's end: "tap" and the first 11 characters of the port, as Nova names it
	MAC  string
	Port string // Neutron's id of it
	IP   string // as the metadata has it; the guest itself has no address
}

func (id identity) nic(n int) NIC {
	port := uuid.NewSHA1(uuid.NameSpaceOID, fmt.Appendf(nil, "%s/nic%d", id.UUID, n))
	mac, _ := hex.DecodeString(id.UUID[:4])
	return NIC{
		Tap:  "tap" + port.String()[:11],
		MAC:  fmt.Sprintf("fa:16:%02x:%02x:%02x:%02x", mac[0], mac[1], id.Number&0xff, (id.Number>>8<<3|n)&0xff),
		Port: port.String(),
		IP:   fmt.Sprintf("198.18.%d.%d", (id.Number*8+n)/250%256, (id.Number*8+n)%250+1),
	}
}

// named gives users, projects and images ids that depend on their names only.
func named(kind, name string) uuid.UUID {
	return uuid.NewSHA1(uuid.NameSpaceOID, []byte("kvmeter-lab/"+kind+"/"+name))
}

func hexID(kind, name string) string { return strings.ReplaceAll(named(kind, name).String(), "-", "") }

// disk is where a guest's disk is and what the guest calls it.
type disk struct {
	Disk
	Path, Target, Bus string
}

func (s GuestSpec) disks(dir string) []disk {
	prefix, bus := "vd", "virtio"
	if s.Kind == KVM {
		prefix, bus = "hd", "ide"
	}
	var all []disk
	for i, d := range s.Disks {
		target := prefix + string(rune('a'+i))
		all = append(all, disk{d, filepath.Join(dir, target+"."+d.Format), target, bus})
	}
	return all
}

var domainTemplate = template.Must(template.New("domain").Funcs(template.FuncMap{"x": escape}).Parse(
	`<domain type='{{if .KVM}}kvm{{else}}qemu{{end}}'>
  <name>{{x .ID.Name}}</name>
  <uuid>{{.ID.UUID}}</uuid>
  <metadata>
    <nova:instance xmlns:nova="http://openstack.org/xmlns/libvirt/nova/1.1">
      <nova:package version="26.2.2"/>
      <nova:name>{{x .Spec.Name}}</nova:name>
      <nova:creationTime>{{.Created}}</nova:creationTime>
      <nova:flavor name="{{x .Spec.Flavor}}">
        <nova:memory>{{.Spec.MemoryMiB}}</nova:memory>
        <nova:disk>1</nova:disk>
        <nova:swap>0</nova:swap>
        <nova:ephemeral>0</nova:ephemeral>
        <nova:vcpus>{{.Spec.VCPUs}}</nova:vcpus>
      </nova:flavor>
      <nova:owner>
        <nova:user uuid="{{.UserID}}">{{x .Spec.User}}</nova:user>
        <nova:project uuid="{{.ProjectID}}">{{x .Spec.Project}}</nova:project>
      </nova:owner>
      <nova:root type="image" uuid="{{.ImageID}}"/>
      <nova:ports>
{{- range .NICs}}
        <nova:port uuid="{{.Port}}">
          <nova:ip type="fixed" address="{{.IP}}" ipVersion="4"/>
        </nova:port>
{{- end}}
      </nova:ports>
    </nova:instance>
  </metadata>
  <memory unit='MiB'>{{.Spec.MemoryMiB}}</memory>
  <vcpu>{{.Spec.VCPUs}}</vcpu>
  <os>
    <type arch='x86_64' machine='pc'>hvm</type>
{{- if .KVM}}
    <loader readonly='yes' type='rom'>{{x .Images.ROM}}</loader>
{{- else}}
    <kernel>{{x .Images.Kernel}}</kernel>
    <initrd>{{x .Images.Initrd}}</initrd>
    <cmdline>{{x .CommandLine}}</cmdline>
{{- end}}
  </os>
  <features><acpi/><apic/>{{if not .KVM}}<tcg><tb-cache unit='MiB'>32</tb-cache></tcg>{{end}}</features>
{{- if .KVM}}
  <cpu mode='custom' match='exact' check='none'><model fallback='allow'>qemu64</model><feature policy='force' name='x2apic'/></cpu>
{{- end}}
  <clock offset='utc'/>
  <on_poweroff>destroy</on_poweroff>
  <on_reboot>restart</on_reboot>
  <on_crash>destroy</on_crash>
  <devices>
    <emulator>{{x .Emulator}}</emulator>
{{- range .Disks}}
    <disk type='file' device='disk'>
      <driver name='qemu' type='{{x .Format}}' cache='{{x .Cache}}' io='{{x .AIO}}'/>
      <source file='{{x .Path}}'/>
      <target dev='{{.Target}}' bus='{{.Bus}}'/>
    </disk>
{{- end}}
{{- range .NICs}}
    <interface type='bridge'>
      <mac address='{{.MAC}}'/>
      <source bridge='{{$.Bridge}}'/>
      <target dev='{{.Tap}}'/>
      <model type='virtio'/>
      <driver name='qemu'/>
      <rom enabled='no'/>
    </interface>
{{- end}}
    <serial type='file'><source path='{{x .Console}}'/><target port='0'/></serial>
{{- if not .KVM}}
    <serial type='unix'><source mode='bind' path='{{x .Serial}}'/><target port='1'/></serial>
{{- end}}
    <controller type='usb' model='none'/>
    <memballoon model='virtio'><stats period='10'/></memballoon>
  </devices>
</domain>
`))

// commandLine boots fast and without anything that would be on the guest's wire.
const commandLine = "console=ttyS0 quiet mitigations=off nokaslr no_timer_check tsc=reliable " +
	"cryptomgr.notests audit=0 ipv6.disable=1 rdinit=/init"

// domain is what the template shows.
type domain struct {
	ID                         identity
	Spec                       GuestSpec
	NICs                       []NIC
	Disks                      []disk
	Images                     images
	Bridge, Emulator           string
	Console, Serial, Created   string
	UserID, ProjectID, ImageID string
	CommandLine                string
}

// KVM is for the template.
func (d domain) KVM() bool { return d.Spec.Kind == KVM }

func (d domain) render() (string, error) {
	d.UserID, d.ProjectID = hexID("user", d.Spec.User), hexID("project", d.Spec.Project)
	d.ImageID, d.CommandLine = named("image", string(d.Spec.Kind)).String(), commandLine
	var b strings.Builder
	if err := domainTemplate.Execute(&b, d); err != nil {
		return "", fmt.Errorf("render domain %s: %w", d.ID.Name, err)
	}
	return strings.NewReplacer(d.Spec.Edits...).Replace(b.String()), nil
}

func escape(s string) (string, error) {
	var b strings.Builder
	err := xml.EscapeText(&b, []byte(s))
	return b.String(), err
}
