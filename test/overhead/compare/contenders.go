package main

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kvmeter/kvmeter/sample"
	"github.com/kvmeter/kvmeter/test/ceilometer"
)

// contender is one way to meter the guests of a host.
type contender struct {
	name  string
	about string // what is set otherwise than by default, and why
	start func(*stage) error
	skip  func(time.Duration) bool // intervals that it is not run at; nil: none
}

// stage is what one turn of a contender has to itself.
type stage struct {
	dir      string // for its files
	libvirt  string // path of libvirt's socket
	readOnly string // the same, for everybody
	broker   string // URL
	program  string // kvmeter-agent
	interval time.Duration
	tally    *tally

	cmd  *exec.Cmd // to be run, in a control group that the turn makes
	sink sink
	done func() error // ends what else was started; nil: nothing
}

// ceilometerMeters are those of the polling.yaml that Debian ships which it has of
// guests.
var ceilometerMeters = []string{
	"cpu", "memory.usage",
	"network.incoming.bytes", "network.incoming.packets", "network.outgoing.bytes", "network.outgoing.packets",
	"disk.device.read.bytes", "disk.device.read.requests", "disk.device.write.bytes", "disk.device.write.requests",
}

// hostMeters are all that need no word with QEMU.
func hostMeters() []string {
	var patterns []string
	for _, m := range sample.Catalogue {
		if m.QEMU {
			patterns = append(patterns, "!"+m.Name)
		}
	}
	return patterns
}

func onlySlow(d time.Duration) bool { return d < 10*time.Second }

var contenders = []contender{
	{"kvmeter lean", "all meters that need no word with QEMU; no cross-check", kvmeter("lean", "0s", hostMeters()), nil},
	{"kvmeter lean, check", "the same, with each domain compared with libvirt once a minute: ten times as often as by default", kvmeter("lean", "1m", hostMeters()), onlySlow},
	{"kvmeter standard", "profile standard: the hooks disk and tcx too", kvmeter("standard", "0s", hostMeters()), nil},
	{"kvmeter deep", "profile deep: the hooks runqueue and exits too, and sizes of packets", kvmeter("deep", "0s", hostMeters()), nil},
	{"kvmeter without BPF", "--without-bpf: /proc is read", kvmeter("lean", "0s", hostMeters(), "--without-bpf"), onlySlow},
	{"kvmeter, Ceilometer's list", "the ten meters of guests in Ceilometer's polling.yaml at the interval, those of QEMU included", kvmeter("lean", "0s", ceilometerMeters), nil},
	{"Ceilometer", "the ten meters of guests in the polling.yaml that Debian ships; instances are found in libvirt's metadata, and flavors in a Nova API that answers at once", startCeilometer, nil},
	{"libvirt exporter", "as it comes; scraped at the interval, compressed, over one connection", startExporter, nil},
	{"collectd virt", "as it comes, sent by the plugin network", startCollectd, nil},
}

// kvmeter runs the agent as its package does: as a user without other rights than
// those it loads BPF programs with, which it drops, with signed batches and its
// spool on disk.
func kvmeter(profile, crosscheck string, meters []string, args ...string) func(*stage) error {
	return func(s *stage) (err error) {
		quoted := make([]string, len(meters))
		for i, m := range meters {
			quoted[i] = fmt.Sprintf("%q", m)
		}
		polling := fmt.Sprintf("sources: [{name: all, interval: %d, meters: [%s]}]\n", int(s.interval.Seconds()), strings.Join(quoted, ", "))
		conf := fmt.Sprintf(`node: host
interval: %s
polling: %s/polling.yaml
profile: %s
crosscheck_interval: %s
libvirt: [%s]
amqp: {url: %q}
key_file: %[2]s/key
spool: {path: %[2]s/spool}
counters: %[2]s/counters
spread: false
socket: ""
pins: ""
ipmi: {device: ""}
`, s.interval, s.dir, profile, crosscheck, s.readOnly, s.broker)
		err = errors.Join(write(s, "polling.yaml", polling), write(s, "agent.yaml", conf), write(s, "key", "the key of the comparison\n"))
		if err != nil {
			return err
		}
		if s.sink, err = batchSink(s.broker, s.tally); err != nil {
			return err
		}
		s.cmd = agentCommand(s, args...)
		return nil
	}
}

// agentCommand is kvmeter-agent with the stage's agent.yaml.
func agentCommand(s *stage, args ...string) *exec.Cmd {
	cmd := exec.Command(s.program, append([]string{"--config", filepath.Join(s.dir, "agent.yaml"), "--log-level", "warn"}, args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Credential:  &syscall.Credential{Uid: nobody, Gid: nobody},
		AmbientCaps: []uintptr{unix.CAP_BPF, unix.CAP_PERFMON, unix.CAP_NET_ADMIN},
	}
	return cmd
}

// nobody is the user that has nothing.
const nobody = 65534

func startCeilometer(s *stage) (err error) {
	if s.sink, err = pollingSink(s.broker, s.tally); err != nil {
		return err
	}
	a := ceilometer.Agent{
		Host: "host", Libvirt: s.libvirt, Broker: s.broker, Interval: s.interval, Meters: ceilometerMeters,
		Flavors: map[string]string{"m1.nano": "f1a40000-0000-4000-8000-000000000001"},
	}
	s.cmd, s.done, err = a.Command(s.dir)
	return err
}

func startExporter(s *stage) error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	addr := l.Addr().String()
	if err := l.Close(); err != nil {
		return err
	}
	s.cmd = exec.Command("prometheus-libvirt-exporter", "--web.listen-address", addr, "--libvirt.uri", connectURI(s.libvirt))
	s.sink = scrapeSink("http://"+addr+"/metrics", "libvirt_", s.tally)
	return nil
}

func startCollectd(s *stage) error {
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	s.sink = networkSink(conn, s.tally)
	conf := fmt.Sprintf(`Hostname "host"
Interval %d
BaseDir "%s"
LoadPlugin virt
LoadPlugin network
<Plugin virt>
  Connection "%s"
</Plugin>
<Plugin network>
  Server "127.0.0.1" "%d"
</Plugin>
`, int(s.interval.Seconds()), s.dir, connectURI(s.libvirt), conn.LocalAddr().(*net.UDPAddr).Port)
	s.cmd = exec.Command("/usr/sbin/collectd", "-f", "-C", filepath.Join(s.dir, "collectd.conf"))
	return write(s, "collectd.conf", conf)
}

func connectURI(socket string) string { return "qemu+unix:///system?socket=" + url.QueryEscape(socket) }

// write writes one of the contender's files, which it may read and no one else.
func write(s *stage, name, text string) error {
	path := filepath.Join(s.dir, name)
	return errors.Join(os.WriteFile(path, []byte(text), 0o600), os.Chown(path, nobody, nobody))
}

// described is the contender's command and its files, without what is of the
// machine.
func (s *stage) described() (string, error) {
	var text strings.Builder
	fmt.Fprintln(&text, "$", strings.Join(s.cmd.Args, " "))
	for _, name := range []string{"agent.yaml", "polling.yaml", "ceilometer.conf", "collectd.conf"} {
		b, err := os.ReadFile(filepath.Join(s.dir, name))
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return "", err
		}
		fmt.Fprintf(&text, "\n# %s\n%s", name, b)
	}
	return strings.NewReplacer(s.dir, "DIR", s.broker, "BROKER", strings.Replace(s.broker, "amqp:", "rabbit:", 1), "BROKER",
		s.program, "kvmeter-agent", s.readOnly, "LIBVIRT-RO", url.QueryEscape(s.libvirt), "LIBVIRT", s.libvirt, "LIBVIRT").Replace(text.String()), nil
}
