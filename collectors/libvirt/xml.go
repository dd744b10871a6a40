package libvirt

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"

	golibvirt "github.com/digitalocean/go-libvirt"

	"github.com/kvmeter/kvmeter/collectors"
)

// novaNamespace is the namespace of Nova's metadata, without its version.
const novaNamespace = "http://openstack.org/xmlns/libvirt/nova/"

// domainXML is what we read of a domain's definition. Numbers are texts: one
// that is none must cost no more than itself.
type domainXML struct {
	Name          string    `xml:"name"`
	UUID          string    `xml:"uuid"`
	Memory        amountXML `xml:"memory"`
	CurrentMemory amountXML `xml:"currentMemory"`
	Title         string    `xml:"title"`
	Perf          []struct {
		Enabled string `xml:"enabled,attr"`
	} `xml:"perf>event"`
	VCPU struct {
		Current string `xml:"current,attr"`
		Value   string `xml:",chardata"`
	} `xml:"vcpu"`
	OS struct {
		Arch string `xml:"arch,attr"`
		Type string `xml:",chardata"`
	} `xml:"os>type"`
	Instances  []instanceXML  `xml:"metadata>instance"`
	Interfaces []interfaceXML `xml:"devices>interface"`
	Disks      []diskXML      `xml:"devices>disk"`
}

type amountXML struct {
	Unit  string `xml:"unit,attr"`
	Value string `xml:",chardata"`
}

type instanceXML struct {
	XMLName xml.Name
	Name    string `xml:"name"`
	Flavor  struct {
		Name       string `xml:"name,attr"`
		ID         string `xml:"id,attr"`
		VCPUs      string `xml:"vcpus"`
		Memory     string `xml:"memory"`
		Disk       string `xml:"disk"`
		Ephemeral  string `xml:"ephemeral"`
		Swap       string `xml:"swap"`
		ExtraSpecs *struct {
			Specs []propertyXML `xml:"extraSpec"`
		} `xml:"extraSpecs"`
	} `xml:"flavor"`
	User struct {
		UUID string `xml:"uuid,attr"`
	} `xml:"owner>user"`
	Project struct {
		UUID string `xml:"uuid,attr"`
	} `xml:"owner>project"`
	Root struct {
		Type string `xml:"type,attr"`
		UUID string `xml:"uuid,attr"`
	} `xml:"root"`
	Image *struct {
		UUID            string        `xml:"uuid,attr"`
		ContainerFormat string        `xml:"containerFormat"`
		DiskFormat      string        `xml:"diskFormat"`
		MinDisk         string        `xml:"minDisk"`
		MinRAM          string        `xml:"minRam"`
		Properties      []propertyXML `xml:"properties>property"`
	} `xml:"image"`
}

type propertyXML struct {
	Name  string `xml:"name,attr"`
	Value string `xml:",chardata"`
}

type deviceXML struct {
	Dev string `xml:"dev,attr"`
}

type interfaceXML struct {
	Type   string     `xml:"type,attr"` // bridge, network, ethernet, direct, …
	Target *deviceXML `xml:"target"`
	MAC    *struct {
		Address string `xml:"address,attr"`
	} `xml:"mac"`
	Source struct {
		Bridge string `xml:"bridge,attr"`
	} `xml:"source"`
	Filter *struct {
		Name       string `xml:"filter,attr"`
		Parameters []struct {
			Name  string `xml:"name,attr"`
			Value string `xml:"value,attr"`
		} `xml:"parameter"`
	} `xml:"filterref"`
	VirtualPort struct {
		InterfaceID string `xml:"interfaceid,attr"`
	} `xml:"virtualport>parameters"`
}

type diskXML struct {
	Device string `xml:"device,attr"` // disk, cdrom, floppy or lun
	Type   string `xml:"type,attr"`   // file, block, network, …
	Driver struct {
		Type  string `xml:"type,attr"`
		Cache string `xml:"cache,attr"`
	} `xml:"driver"`
	Target *deviceXML `xml:"target"`
	Serial string     `xml:"serial"`
	imageXML
	Mirror *imageXML `xml:"mirror"` // what a block job copies the disk to
}

// imageXML is where a disk's data is, and what it is based on.
type imageXML struct {
	Source *struct {
		File string `xml:"file,attr"`
		Dev  string `xml:"dev,attr"`
	} `xml:"source"`
	Backing *imageXML `xml:"backingStore"`
}

// sources returns the paths of the image and of its backing chain.
func (x *imageXML) sources() (paths []string) {
	for ; x != nil; x = x.Backing {
		if x.Source == nil {
			continue
		}
		for _, path := range []string{x.Source.File, x.Source.Dev} {
			if path != "" {
				paths = append(paths, path)
			}
		}
	}
	return paths
}

// metadata is resource_metadata as Ceilometer's compute agent makes it. What
// the definition does not say is left out; Nova's part is nil for a domain that
// Nova did not make.
type metadata struct {
	DisplayName string `json:"display_name,omitempty"`
	Name        string `json:"name"`
	InstanceID  string `json:"instance_id"`
	*novaMetadata
	InstanceHost string `json:"instance_host"`
	Status       string `json:"status,omitempty"`
	State        string `json:"state,omitempty"`
	Architecture string `json:"architecture,omitempty"`
	OSType       string `json:"os_type,omitempty"`
	VCPUs        int    `json:"vcpus"`
	MemoryMB     int    `json:"memory_mb"`

	UserMetadata map[string]string `json:"user_metadata,omitempty"`

	// Samples of the domain's CPU time only.
	CPUNumber int `json:"cpu_number,omitempty"`

	// Sums over its disks only.
	Devices []string `json:"device,omitempty"`

	// Samples of a disk only.
	DiskName string `json:"disk_name,omitempty"`

	*nicMetadata
}

type novaMetadata struct {
	InstanceType string         `json:"instance_type"`
	Host         string         `json:"host"` // Nova's public id of the host
	Flavor       flavor         `json:"flavor"`
	TaskState    string         `json:"task_state"` // unknown to libvirt
	Image        *image         `json:"image"`
	ImageRef     *string        `json:"image_ref"`
	ImageRefURL  *string        `json:"image_ref_url"`
	ImageMeta    map[string]any `json:"image_meta,omitempty"`
	DiskGB       int            `json:"disk_gb"`
	EphemeralGB  int            `json:"ephemeral_gb"`
	RootGB       int            `json:"root_gb"`
}

type flavor struct {
	ID         string            `json:"id"`
	Name       string            `json:"name"`
	VCPUs      int               `json:"vcpus"`
	RAM        int               `json:"ram"`
	Disk       int               `json:"disk"`
	Ephemeral  int               `json:"ephemeral"`
	Swap       int               `json:"swap"`
	ExtraSpecs map[string]string `json:"extra_specs,omitempty"`
}

type image struct {
	ID string `json:"id"`
}

type nicMetadata struct {
	MAC        string             `json:"mac"`
	Filter     *string            `json:"fref"`
	Parameters map[string]*string `json:"parameters"`
	VNICName   string             `json:"vnic_name"`
}

var errNoUUID = errors.New("the domain's XML has no uuid or no name")

// parse makes a definition of a domain's live XML. What is missing in the XML is missing in
// the definition; an error means that the text is no domain.
func parse(text []byte, state golibvirt.DomainState, opts *Options) (*collectors.Definition, error) {
	text = bytes.Map(legal, text)
	var x domainXML
	if err := xml.Unmarshal(text, &x); err != nil {
		return nil, fmt.Errorf("read domain XML: %w", err)
	}
	x.UUID = strings.ToLower(strings.TrimSpace(x.UUID))
	if x.UUID == "" || x.Name == "" {
		return nil, errNoUUID
	}
	d := &collectors.Definition{
		UUID: x.UUID, Name: x.Name, VCPUs: number(x.VCPU.Current), State: int(state),
	}
	memory := x.CurrentMemory
	if memory.Value == "" || state == golibvirt.DomainShutoff { // as virDomainGetInfo says of a domain that is off
		memory = x.Memory
	}
	d.Memory = uint64(kibibytes(memory.Value, memory.Unit))
	for _, e := range x.Perf {
		d.Perf = d.Perf || e.Enabled == "yes"
	}
	if d.VCPUs == 0 {
		d.VCPUs = number(x.VCPU.Value)
	}
	m := metadata{
		Name: x.Name, InstanceID: x.UUID, InstanceHost: opts.Host,
		Architecture: x.OS.Arch, OSType: strings.TrimSpace(x.OS.Type),
		VCPUs: d.VCPUs, MemoryMB: kibibytes(x.Memory.Value, x.Memory.Unit) >> 10,
	}
	m.State, m.Status = states(state)
	var all node
	if opts.OwnerProject != "" || opts.OwnerUser != "" || opts.UserMetadata != "" {
		if err := xml.Unmarshal(text, &all); err != nil {
			return nil, fmt.Errorf("read domain XML: %w", err)
		}
		m.UserMetadata = opts.userMetadata(&all)
	}
	nova := novaInstance(x.Instances)
	if nova != nil {
		d.Display, d.Project, d.User = nova.Name, nova.Project.UUID, nova.User.UUID
		m.DisplayName = nova.Name
		m.novaMetadata = nova.metadata(opts)
		m.VCPUs, m.MemoryMB = m.Flavor.VCPUs, m.Flavor.RAM
		d.Flavor = &collectors.Flavor{Name: m.Flavor.Name, RootGiB: m.RootGB, EphemeralGiB: m.EphemeralGB}
	} else {
		d.Project, d.User = opts.OwnerProject.text(&all), opts.OwnerUser.text(&all)
		d.Display = strings.TrimSpace(x.Title)
		m.DisplayName = d.Display
	}

	d.Metadata = m.json()
	own := m
	own.CPUNumber = d.VCPUs
	d.CPUMetadata = own.json()
	for i := range x.Interfaces {
		if n, ok := x.Interfaces[i].nic(d, nova != nil, m); ok {
			d.NICs = append(d.NICs, n)
		}
	}
	sums := m
	for _, disk := range x.Disks {
		if disk.Target == nil || disk.Target.Dev == "" || disk.Source == nil {
			continue
		}
		of := m
		of.DiskName = disk.Target.Dev
		d.Disks = append(d.Disks, collectors.Disk{
			Device: disk.Target.Dev, Sources: append(disk.imageXML.sources(), disk.Mirror.sources()...),
			Direct: disk.Driver.Cache == "none" || disk.Driver.Cache == "directsync",
			Serial: disk.Serial, Removable: disk.Device == "cdrom" || disk.Device == "floppy",
			Kind: disk.Type, Format: disk.Driver.Type,
			Resource: d.UUID + "-" + disk.Target.Dev, Metadata: of.json(),
		})
		sums.Devices = append(sums.Devices, disk.Target.Dev)
	}
	d.DisksMetadata = sums.json()
	return d, nil
}

// legal has U+FFFD stand for what is no character of XML, as it does for bytes that
// are no UTF-8: a name that has one costs itself only.
func legal(r rune) rune {
	if r < ' ' && r != '\t' && r != '\n' && r != '\r' || r == '\ufffe' || r == '\uffff' {
		return utf8.RuneError
	}
	return r
}

// nic returns the interface, unless it has no end on the host that can be
// named or no MAC address, as a passed-through device.
func (x *interfaceXML) nic(d *collectors.Definition, nova bool, m metadata) (collectors.NIC, bool) {
	if x.Target == nil || x.Target.Dev == "" || x.MAC == nil {
		return collectors.NIC{}, false
	}
	dev := x.Target.Dev
	n := collectors.NIC{Device: dev, MAC: x.MAC.Address, Resource: d.Name + "-" + d.UUID + "-" + dev, Macvtap: x.Type == "direct"}
	nm := &nicMetadata{MAC: x.MAC.Address, VNICName: dev, Parameters: map[string]*string{"interfaceid": nil, "bridge": nil}}
	if x.Filter != nil && x.Filter.Name != "" {
		for i := range x.Filter.Parameters {
			nm.Parameters[strings.ToLower(x.Filter.Parameters[i].Name)] = &x.Filter.Parameters[i].Value
		}
		nm.Filter, nm.VNICName = &x.Filter.Name, x.Filter.Name
		if nova { // Nova makes a filter for each interface; others share theirs
			n.Resource = x.Filter.Name
		}
	}
	if x.VirtualPort.InterfaceID != "" {
		nm.Parameters["interfaceid"] = &x.VirtualPort.InterfaceID
	}
	if x.Source.Bridge != "" {
		nm.Parameters["bridge"] = &x.Source.Bridge
	}
	m.Name = dev
	m.nicMetadata = nm
	n.Metadata = m.json()
	return n, true
}

// novaInstance returns Nova's metadata: of the newest version that there is.
func novaInstance(all []instanceXML) (newest *instanceXML) {
	for i := range all {
		x := &all[i]
		if strings.HasPrefix(x.XMLName.Space, novaNamespace) && (newest == nil || x.XMLName.Space > newest.XMLName.Space) {
			newest = x
		}
	}
	return newest
}

func (x *instanceXML) metadata(opts *Options) *novaMetadata {
	f := &x.Flavor
	sum := sha256.Sum224([]byte(x.Project.UUID + opts.Host))
	m := &novaMetadata{
		InstanceType: f.Name, Host: hex.EncodeToString(sum[:]),
		Flavor: flavor{
			ID: f.ID, Name: f.Name, VCPUs: number(f.VCPUs), RAM: number(f.Memory),
			Disk: number(f.Disk), Ephemeral: number(f.Ephemeral), Swap: number(f.Swap),
		},
		DiskGB: number(f.Disk), EphemeralGB: number(f.Ephemeral),
		RootGB: number(f.Disk) - number(f.Ephemeral),
	}
	if m.Flavor.ID == "" {
		m.Flavor.ID = cmp.Or(opts.FlavorIDs[f.Name], f.Name)
	}
	if f.ExtraSpecs != nil {
		m.Flavor.ExtraSpecs = map[string]string{}
		for _, s := range f.ExtraSpecs.Specs {
			m.Flavor.ExtraSpecs[s.Name] = s.Value
		}
	}
	if x.Root.Type == "image" && x.Root.UUID != "" {
		m.Image, m.ImageRef = &image{x.Root.UUID}, &x.Root.UUID
	}
	if x.Image != nil {
		m.ImageMeta = map[string]any{
			"base_image_ref": x.Image.UUID, "container_format": x.Image.ContainerFormat,
			"disk_format": x.Image.DiskFormat, "min_disk": x.Image.MinDisk, "min_ram": x.Image.MinRAM,
		}
		for _, p := range x.Image.Properties {
			m.ImageMeta[p.Name] = p.Value
		}
	}
	return m
}

func (m metadata) json() []byte {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(m); err != nil {
		return nil // texts and integers only: cannot happen
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n"))
}

// states returns Nova's vm_state and status of a libvirt state, as Ceilometer
// translates it.
func states(s golibvirt.DomainState) (state, status string) {
	switch s {
	case golibvirt.DomainNostate:
		return "pending", "building"
	case golibvirt.DomainRunning, golibvirt.DomainBlocked:
		return "running", "active"
	case golibvirt.DomainPaused:
		return "paused", "paused"
	case golibvirt.DomainShutdown, golibvirt.DomainShutoff:
		return "shutdown", "stopped"
	case golibvirt.DomainCrashed:
		return "crashed", "error"
	case golibvirt.DomainPmsuspended:
		return "suspended", "suspended"
	}
	return "", ""
}

// number returns the integer in s, or 0.
func number(s string) int {
	n, err := strconv.Atoi(strings.TrimSpace(s))
	if err != nil || n < 0 {
		return 0
	}
	return n
}

// kibibytes converts an amount of memory in libvirt's units. Live XML is always
// in KiB.
func kibibytes(s, unit string) int {
	switch n := number(s); unit {
	case "b", "bytes":
		return n >> 10
	case "", "k", "KiB":
		return n
	case "M", "MiB":
		return n << 10
	case "G", "GiB":
		return n << 20
	}
	return 0
}
