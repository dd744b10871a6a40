package agent

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"
	"go.yaml.in/yaml/v3"

	"github.com/kvmeter/kvmeter/agent/delivery"
	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/collectors/libvirt"
	"github.com/kvmeter/kvmeter/sample"
)

// Config is the agent's part of the configuration.
type Config struct {
	// Node is the name of this host: what its samples say they come from, and
	// the id of the key that signs them. Default: the host name.
	Node string `yaml:"node"`
	// Interval between two polls, for meters that no polling file names.
	Interval time.Duration `yaml:"interval"`
	// Polling is the path of polling.yaml: sources with their meters and
	// intervals. Empty: everything is polled.
	Polling string `yaml:"polling"`
	// QEMUInterval is the least interval at which meters that make every QEMU
	// work are polled, unless polling.yaml names them without a wildcard.
	QEMUInterval time.Duration `yaml:"qemu_interval"`
	// KVMInterval is the least interval at which KVM's statistics are read.
	KVMInterval time.Duration `yaml:"kvm_interval"`
	// Libvirt lists the sockets of the host's libvirts; read-only ones are
	// enough. Of several in one folder the first that answers is used, and of each
	// folder one, so that the domains of all libvirts are known where each pod or
	// container has its own. A path may have the wildcards *, ? and [] for
	// libvirts that come and go, such as /proc/*/root/run/libvirt/libvirt-sock-ro; auto
	// stands for all usual places. The word off instead of a list: domains are
	// found without libvirt, and what only libvirt knows is missing.
	Libvirt Sockets `yaml:"libvirt"`
	// LibvirtTimeout bounds each call of libvirt.
	LibvirtTimeout time.Duration `yaml:"libvirt_timeout"`
	// Profile says which BPF hooks are attached at start. lean: none, counters
	// of the kernel only. standard: disk and tcx. deep: runqueue and exits too,
	// and sizes of packets.
	Profile string `yaml:"profile"`
	// Hooks switches single hooks on or off, whatever the profile says, such as
	// {disk: off}. A hook that is off can be switched on while the agent runs.
	Hooks map[string]bool `yaml:"hooks"`
	// Budget is how much of one core metering may take, in percent: the polls,
	// and the hooks by what their events were measured to take. Beyond it,
	// hooks are switched off: exits, runqueue, tcx, disk. 0: no bound.
	Budget float64 `yaml:"budget"`
	// HistogramInterval is the least interval at which families of meters, such
	// as histograms, are polled, unless polling.yaml names them without a wildcard.
	HistogramInterval time.Duration `yaml:"histogram_interval"`
	// CrosscheckInterval is how often each domain's figures are compared with
	// libvirt's, spread over the time between. 0s: never.
	CrosscheckInterval time.Duration `yaml:"crosscheck_interval"`
	// CrosscheckTolerance says how far both may be apart, by name or pattern of
	// the meter, such as {"network.*": {absolute: 1500, relative: 0.001}}. A
	// name holds over a pattern, a longer pattern over a shorter one.
	CrosscheckTolerance map[string]Tolerance `yaml:"crosscheck_tolerance"`
	// Origins says whom a meter may be billed from, by name or pattern, best
	// first, such as {"network.*": [libvirt, rtnl]}; one takes over where the
	// ones before it fail. Default: the order in docs/meters.md.
	Origins map[string][]sample.Origin `yaml:"origins"`
	// FalloverInterval is the least time between two readings by libvirt where
	// it counts in place of the kernel. They make no QEMU work.
	FalloverInterval time.Duration `yaml:"fallover_interval"`
	// IPMI says how the host's BMC is read.
	IPMI IPMIConfig `yaml:"ipmi"`
	// CPUDefinition says what the meter cpu counts. vcpu: the time that vCPU
	// threads spent on a CPU. ceilometer: that and the time that they waited for
	// one, as the sum of libvirt's vcpu.N.time and vcpu.N.wait; the latter is 0 on
	// Linux 5.16 and newer, and without kernel.sched_schedstats. Default where wire
	// is ceilometer: ceilometer.
	CPUDefinition string `yaml:"cpu_definition"`
	// LegacyMeters switches meters of Ceilometer's older releases on, for
	// wildcards in polling.yaml: true for all, or a list of names and patterns
	// such as [instance, "disk.*", "*.rate"]. One that polling.yaml names is
	// polled in any case. docs/meters.md lists them.
	LegacyMeters Patterns `yaml:"legacy_meters"`
	// LegacyUnits has memory told in MB and disks in GB, as Ceilometer did up to
	// 2025.2, instead of MiB and GiB; the numbers are the same.
	LegacyUnits bool `yaml:"legacy_units"`
	// StoppedDomains has domains that do not run sampled too, as far as they have
	// anything: power.state, vcpus, memory (all that they may have) and the sizes
	// of their disks. disk.root.size and disk.ephemeral.size they have in any case.
	StoppedDomains bool `yaml:"stopped_domains"`
	// FlavorIDs are the ids of Nova's flavors by name, such as {m1.small:
	// 7f9f8a0b-…}, for metadata of Nova before 2025.2, which has only their names.
	// One that is not listed has its name as its id.
	FlavorIDs map[string]string `yaml:"flavor_ids"`
	// OwnerProject is where the project of a domain that Nova did not make is
	// found in its XML: names of elements with / between them, and @ before an
	// attribute at the end, such as title or metadata/owner/@project.
	OwnerProject libvirt.Path `yaml:"owner_project"`
	// OwnerUser is the same of its user.
	OwnerUser libvirt.Path `yaml:"owner_user"`
	// UserMetadata is the path of elements of a domain's XML that are its user
	// metadata, such as metadata/tags/tag: each has its key in the attribute key
	// or name, and its value as its text or in the attribute value.
	UserMetadata libvirt.Path `yaml:"user_metadata"`
	// ReservedMetadataNamespace says what user metadata begins with that samples
	// have, as user_metadata in their metadata; it is cut off there.
	ReservedMetadataNamespace []string `yaml:"reserved_metadata_namespace"`
	// ReservedMetadataKeys are keys of user metadata that samples have as well.
	ReservedMetadataKeys []string `yaml:"reserved_metadata_keys"`
	// ReservedMetadataLength is how many characters of it they have.
	ReservedMetadataLength int `yaml:"reserved_metadata_length"`
	// Source is the samples' field of that name.
	Source string `yaml:"source"`
	// KeyFile is the file of the secret that signs batches, at least 16 bytes; of
	// several lines the first. It is read again when it changes. Empty: they are not
	// signed, and taken only where that is allowed. A path that begins with $CREDENTIALS_DIRECTORY/ is a credential of
	// systemd's.
	KeyFile string `yaml:"key_file"`
	// Partitions is how many queues the samples of all nodes are spread over;
	// the program sets it from the bus's configuration.
	Partitions int `yaml:"-"`
	// Spool says how batches are kept on disk until they are delivered.
	Spool delivery.Spool `yaml:"spool"`
	// QueueBytes bounds the batches that wait in memory while the bus cannot
	// be reached and there is no spool on disk. Beyond it the oldest are dropped,
	// which is recorded as a gap of each meter.
	QueueBytes int64 `yaml:"queue_bytes"`
	// Spread delays the sending of each batch by a part of the interval that
	// is chosen at random at start, so that many hosts do not send at once.
	Spread bool `yaml:"spread"`
	// Socket is the path of the local socket that `kvmeter top` reads. Empty: none.
	Socket string `yaml:"socket"`
	// SocketGroup is the group that may use the socket, if it exists.
	SocketGroup string `yaml:"socket_group"`
	// Counters is the path of the file that keeps what was counted over a restart
	// of the agent, however it ends; it is worthless once the host was
	// restarted. Empty: CPU time of vCPUs that were unplugged, and what hooks
	// have counted, starts at zero with the agent.
	Counters string `yaml:"counters"`
	// Pins is a folder on a BPF file system where the hooks that account domains
	// at their end stay while no agent runs, so that one which ends then is
	// accounted by the next. Empty: they end with the agent.
	Pins string `yaml:"pins"`
	// ShutdownTimeout bounds how long the agent tries to deliver what is
	// queued when it is told to stop.
	ShutdownTimeout time.Duration `yaml:"shutdown_timeout"`
}

// DefaultConfig returns the configuration of a daemon.
func DefaultConfig() Config {
	node, err := os.Hostname()
	if err != nil {
		node = "localhost"
	}
	return Config{
		Node:                node,
		Interval:            10 * time.Second,
		KVMInterval:         10 * time.Second,
		QEMUInterval:        300 * time.Second,
		Libvirt:             Sockets(libvirt.DefaultSockets),
		LibvirtTimeout:      5 * time.Second,
		Profile:             "standard",
		Hooks:               map[string]bool{},
		Budget:              1,
		HistogramInterval:   time.Minute,
		CrosscheckInterval:  10 * time.Minute,
		CrosscheckTolerance: map[string]Tolerance{},
		FlavorIDs:           map[string]string{},

		ReservedMetadataNamespace: []string{"metering."},
		ReservedMetadataKeys:      []string{},
		ReservedMetadataLength:    256,

		Origins:          map[string][]sample.Origin{},
		FalloverInterval: 10 * time.Second,
		IPMI:             defaultIPMI(),
		CPUDefinition:    "vcpu",
		Source:           "openstack",
		Partitions:       1,
		Spool:            delivery.DefaultSpool(),
		QueueBytes:       64 << 20,
		Spread:           true,
		Socket:           "/run/kvmeter/agent.sock",
		SocketGroup:      "kvmeter",
		Counters:         "/run/kvmeter/counters",
		Pins:             "/sys/fs/bpf/kvmeter",
		ShutdownTimeout:  5 * time.Second,
	}
}

// minInterval bounds intervals from below: a poll at 500 domains takes some ms.
const minInterval = 100 * time.Millisecond

// Check returns an error that names the first option with an impossible value.
func (c *Config) Check() error {
	switch {
	case c.Node == "":
		return errors.New("node is empty: give the host a name")
	case c.Interval < minInterval:
		return fmt.Errorf("interval %s is too short: use at least %s", c.Interval, minInterval)
	case c.QEMUInterval < minInterval:
		return fmt.Errorf("qemu_interval %s is too short: use at least %s", c.QEMUInterval, minInterval)
	case c.HistogramInterval < minInterval:
		return fmt.Errorf("histogram_interval %s is too short: use at least %s", c.HistogramInterval, minInterval)
	case !(c.Budget >= 0):
		return fmt.Errorf("budget %v: must be a percentage of one core, or 0 for no bound", c.Budget)
	case profiles[c.Profile] == nil:
		return fmt.Errorf("profile %q is not known: lean, standard and deep are", c.Profile)
	case c.KVMInterval < minInterval:
		return fmt.Errorf("kvm_interval %s is too short: use at least %s", c.KVMInterval, minInterval)
	case c.LibvirtTimeout <= 0:
		return fmt.Errorf("libvirt_timeout %s: must be more than 0", c.LibvirtTimeout)
	case c.CrosscheckInterval != 0 && c.CrosscheckInterval < minInterval:
		return fmt.Errorf("crosscheck_interval %s is too short: use at least %s, or 0s for never", c.CrosscheckInterval, minInterval)
	case c.FalloverInterval < minInterval:
		return fmt.Errorf("fallover_interval %s is too short: use at least %s", c.FalloverInterval, minInterval)
	case c.CPUDefinition != "vcpu" && c.CPUDefinition != "ceilometer":
		return fmt.Errorf("cpu_definition %q: it is vcpu, the time that vCPU threads spent on a CPU, or ceilometer, libvirt's vcpu.N.time and vcpu.N.wait", c.CPUDefinition)
	case c.ReservedMetadataLength < 0:
		return fmt.Errorf("reserved_metadata_length %d: must not be negative", c.ReservedMetadataLength)
	case c.Partitions < 1:
		return fmt.Errorf("amqp.partitions %d: must be at least 1", c.Partitions)
	case c.QueueBytes < 1<<20:
		return fmt.Errorf("queue_bytes %d is too small: use at least 1048576", c.QueueBytes)
	}
	if err := c.Spool.Check(); err != nil {
		return err
	}
	if err := libvirt.CheckSockets(c.Libvirt); err != nil {
		return fmt.Errorf("libvirt: %w", err)
	}
	for _, p := range []struct {
		key  string
		path libvirt.Path
	}{{"owner_project", c.OwnerProject}, {"owner_user", c.OwnerUser}, {"user_metadata", c.UserMetadata}} {
		if p.path != "" {
			if err := p.path.Check(); err != nil {
				return fmt.Errorf("%s: %w", p.key, err)
			}
		}
	}
	if _, err := c.LegacyMeters.matcher(); err != nil {
		return fmt.Errorf("legacy_meters: %w", err)
	}
	if err := c.IPMI.check(); err != nil {
		return err
	}
	for name := range c.Hooks {
		if !slices.Contains(hookNames, name) {
			return fmt.Errorf("hooks: there is no hook %q; there are %s", name, strings.Join(hookNames, ", "))
		}
	}
	return nil
}

// libvirtOptions are those of the client of libvirt.
func (c *Config) libvirtOptions() libvirt.Options {
	return libvirt.Options{
		Sockets: c.Libvirt, Host: c.Node, Timeout: c.LibvirtTimeout, FlavorIDs: c.FlavorIDs,
		OwnerProject: c.OwnerProject, OwnerUser: c.OwnerUser, UserMetadata: c.UserMetadata,
		Reserved: libvirt.Reserved{Namespaces: c.ReservedMetadataNamespace, Keys: c.ReservedMetadataKeys, Length: c.ReservedMetadataLength},
	}
}

// hookOn says whether the hook is attached at start.
func (c *Config) hookOn(name string) bool {
	if on, said := c.Hooks[name]; said {
		return on
	}
	return slices.Contains(profiles[c.Profile], name)
}

// keys reads the key file.
func (c *Config) keys(log *zap.Logger) (bus.Keys, error) {
	if c.KeyFile == "" {
		return sample.Keys{}, nil
	}
	keys, err := bus.NewKeyFile(c.Node, c.KeyFile, log)
	if err != nil {
		return nil, fmt.Errorf("key_file: %w", err)
	}
	return keys, nil
}

// Patterns is a list of names and patterns of meters. It reads true, for all, and
// false, for none, as well as a list.
type Patterns []string

// matcher returns nil for an empty list, which matches nothing.
func (p Patterns) matcher() (*sample.Matcher, error) {
	if len(p) == 0 {
		return nil, nil
	}
	return sample.NewMatcher(p)
}

// UnmarshalYAML implements yaml.Unmarshaler.
func (p *Patterns) UnmarshalYAML(n *yaml.Node) error {
	var all bool
	if n.Kind == yaml.ScalarNode && n.Decode(&all) == nil {
		*p = nil
		if all {
			*p = Patterns{"*"}
		}
		return nil
	}
	var list []string
	if err := n.Decode(&list); err != nil {
		return err
	}
	*p = list
	return nil
}

// MarshalYAML implements yaml.Marshaler.
func (p Patterns) MarshalYAML() (any, error) {
	switch {
	case len(p) == 0:
		return false, nil
	case len(p) == 1 && p[0] == "*":
		return true, nil
	}
	return []string(p), nil
}

// Sockets is a list of paths. It reads one path or the word "off" as well as
// a list.
type Sockets []string

// UnmarshalYAML implements yaml.Unmarshaler.
func (s *Sockets) UnmarshalYAML(n *yaml.Node) error {
	if n.Kind == yaml.ScalarNode {
		*s = nil
		if n.Value != "off" {
			*s = Sockets{n.Value}
		}
		return nil
	}
	var list []string
	if err := n.Decode(&list); err != nil {
		return err
	}
	*s = list
	return nil
}

// MarshalYAML implements yaml.Marshaler.
func (s Sockets) MarshalYAML() (any, error) {
	if len(s) == 0 {
		return "off", nil
	}
	return []string(s), nil
}
