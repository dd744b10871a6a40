package agent

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/kvmeter/kvmeter/collectors/libvirt"
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
	// Libvirt lists libvirt's sockets, tried in order; a read-only one is
	// enough. The word "off" instead of a list: domains are found without
	// libvirt, and what only libvirt knows is missing.
	Libvirt Sockets `yaml:"libvirt"`
	// LibvirtTimeout bounds each call of libvirt.
	LibvirtTimeout time.Duration `yaml:"libvirt_timeout"`
	// CPUDefinition says what the meter cpu counts: "vcpu", the time that vCPU
	// threads spent on a CPU.
	CPUDefinition string `yaml:"cpu_definition"`
	// Source is the samples' field of that name.
	Source string `yaml:"source"`
	// KeyFile is the file of the secret that signs batches, at least 16 bytes.
	// Empty: they are not signed, and taken only where that is allowed.
	KeyFile string `yaml:"key_file"`
	// Partitions is how many queues the samples of all nodes are spread over;
	// the program sets it from the bus's configuration.
	Partitions int `yaml:"-"`
	// QueueBytes bounds the batches that wait in memory while the bus cannot
	// be reached. Beyond it the oldest are dropped, which is recorded as a gap.
	QueueBytes int64 `yaml:"queue_bytes"`
	// Spread delays the sending of each batch by a part of the interval that
	// is chosen at random at start, so that many hosts do not send at once.
	Spread bool `yaml:"spread"`
	// Socket is the path of the local socket that `kvmeter top` reads. Empty: none.
	Socket string `yaml:"socket"`
	// SocketGroup is the group that may use the socket, if it exists.
	SocketGroup string `yaml:"socket_group"`
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
		Node:            node,
		Interval:        10 * time.Second,
		QEMUInterval:    300 * time.Second,
		Libvirt:         Sockets(libvirt.DefaultSockets),
		LibvirtTimeout:  5 * time.Second,
		CPUDefinition:   "vcpu",
		Source:          "openstack",
		Partitions:      1,
		QueueBytes:      64 << 20,
		Spread:          true,
		Socket:          "/run/kvmeter/agent.sock",
		SocketGroup:     "kvmeter",
		ShutdownTimeout: 5 * time.Second,
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
	case c.LibvirtTimeout <= 0:
		return fmt.Errorf("libvirt_timeout %s: must be more than 0", c.LibvirtTimeout)
	case c.CPUDefinition != "vcpu":
		return fmt.Errorf("cpu_definition %q is not supported: only \"vcpu\" is, the time that vCPU threads spent on a CPU", c.CPUDefinition)
	case c.Partitions < 1:
		return fmt.Errorf("amqp.partitions %d: must be at least 1", c.Partitions)
	case c.QueueBytes < 1<<20:
		return fmt.Errorf("queue_bytes %d is too small: use at least 1048576", c.QueueBytes)
	}
	return nil
}

// secret reads the key file.
func (c *Config) secret() ([]byte, error) {
	if c.KeyFile == "" {
		return nil, nil
	}
	data, err := os.ReadFile(c.KeyFile)
	if err != nil {
		return nil, fmt.Errorf("read key_file: %w", err)
	}
	secret := strings.TrimSpace(string(data))
	if len(secret) < 16 {
		return nil, fmt.Errorf("key_file %s: secret of %d bytes is too short; use at least 16, for example from `openssl rand -hex 32`", c.KeyFile, len(secret))
	}
	return []byte(secret), nil
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
