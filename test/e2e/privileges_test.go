//go:build lab

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kvmeter/kvmeter/agent/client"
	"github.com/kvmeter/kvmeter/test/lab"
)

// capabilities are those that docs/privileges.md speaks of.
var capabilities = []struct {
	name string
	bit  uintptr
}{
	{"CAP_BPF", unix.CAP_BPF},
	{"CAP_PERFMON", unix.CAP_PERFMON},
	{"CAP_NET_ADMIN", unix.CAP_NET_ADMIN},
	{"CAP_SYS_PTRACE", unix.CAP_SYS_PTRACE},
}

// privileges is a row of the table in docs/privileges.md.
type privileges struct {
	profile       string
	start, steady []string
	hooks         string // that are attached
	reads         string // origin of CPU time
}

// privilegeTable reads the table: what it says is what is tested.
func privilegeTable(t *testing.T) []privileges {
	t.Helper()
	page, err := os.ReadFile("../../docs/privileges.md")
	check(t, err)
	var rows []privileges
	for line := range strings.Lines(string(page)) {
		cells := strings.Split(strings.TrimSpace(line), "|")
		if len(cells) != 7 || !strings.HasPrefix(cells[1], " `") {
			continue
		}
		for i := range cells {
			cells[i] = strings.ReplaceAll(strings.TrimSpace(cells[i]), "`", "")
		}
		list := func(cell string) []string {
			if cell == "none" {
				return nil
			}
			return strings.Split(cell, ", ")
		}
		rows = append(rows, privileges{cells[1], list(cells[2]), list(cells[3]), cells[4], cells[5]})
	}
	if len(rows) < 5 {
		t.Fatalf("docs/privileges.md has a table of %d rows", len(rows))
	}
	return rows
}

// TestPrivileges runs the agent as an ordinary user with just the capabilities
// that the documentation lists, looks at what it keeps, and has a guest started
// after it has dropped the rest.
func TestPrivileges(t *testing.T) {
	l := lab.Start(t, lab.Options{})
	check(t, l.StartLibvirt(t.Context()))
	_, err := l.StartGuest(t.Context(), lab.GuestSpec{Kind: lab.KVM, Mode: "pulse"})
	check(t, err)
	for _, row := range privilegeTable(t) {
		t.Run(row.profile, func(t *testing.T) { row.test(t, l) })
	}
}

func (p privileges) test(t *testing.T, l *lab.Lab) {
	dir := t.TempDir()
	for d := dir; d != os.TempDir(); d = filepath.Dir(d) {
		check(t, os.Chmod(d, 0o755))
	}
	run := filepath.Join(dir, "run")
	check(t, os.Mkdir(run, 0o755))
	check(t, os.Chown(run, 65534, 65534))
	profile, flag, _ := strings.Cut(p.profile, " ")
	config := filepath.Join(dir, "agent.yaml")
	check(t, os.WriteFile(config, []byte(fmt.Sprintf(`
node: compute-1
interval: 1s
profile: %s
libvirt: [%s]
socket: %[3]s/agent.sock
counters: %[3]s/counters
spool: {path: %[3]s/spool}
pins: ""
amqp: {url: "amqp://%[4]s/"}
`, profile, l.ReadOnlySocket(), run, freeAddress(t))), 0o644))
	var ambient []uintptr
	for _, c := range capabilities {
		if slices.Contains(p.start, c.name) {
			ambient = append(ambient, c.bit)
		}
	}
	agent := &daemon{
		t: t, path: binary(t, "kvmeter-agent"), args: []string{"--config", config}, log: filepath.Join(dir, "log"),
		attr: &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}, AmbientCaps: ambient},
	}
	if flag != "" {
		agent.args = append(agent.args, flag)
	}
	agent.start()
	defer func() {
		// What it could not send to a broker that is not there is lost, which it says.
		_ = agent.cmd.Process.Signal(syscall.SIGTERM)
		_ = agent.cmd.Wait()
		if t.Failed() {
			log, _ := os.ReadFile(agent.log)
			t.Logf("%s", log)
		}
	}()
	asked := client.Client{Path: filepath.Join(run, "agent.sock")}
	first := p.domains(t, asked, 1)
	if first[0].Origin != p.reads {
		t.Errorf("CPU time is read by %q, want %q", first[0].Origin, p.reads)
	}
	for _, task := range tasks(t, agent.cmd.Process.Pid) {
		if got := kept(t, task); !slices.Equal(got, p.steady) {
			t.Errorf("%s keeps %v, want %v", task, got, p.steady)
		}
	}
	hooks, err := asked.Hooks(t.Context())
	check(t, err)
	var on []string
	for _, h := range hooks {
		if h.On && h.Fault == "" {
			on = append(on, h.Name)
		}
	}
	if got := strings.Join(on, ", "); got != p.hooks && (got != "" || p.hooks != "none") {
		t.Errorf("attached are %q, want %q", got, p.hooks)
	}

	// A guest that comes now is metered, its tap included.
	g, err := l.StartGuest(t.Context(), lab.GuestSpec{Kind: lab.KVM, Mode: "pulse"})
	check(t, err)
	defer func() { check(t, g.Destroy(t.Context())) }()
	p.domains(t, asked, 2)
	if !slices.Contains(on, "tcx") {
		return
	}
	deadline := time.Now().Add(20 * time.Second)
	for {
		hooks, err := asked.Hooks(t.Context())
		check(t, err)
		i := slices.IndexFunc(hooks, func(h client.Hook) bool { return h.Name == "tcx" })
		if hooks[i].Entries == 2 && hooks[i].Fault == "" {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("the new guest's NIC is not followed: %+v", hooks[i])
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// domains waits until the agent meters n domains of the lab.
func (p privileges) domains(t *testing.T, agent client.Client, n int) []client.Domain {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for {
		var last client.Snapshot
		err := agent.Watch(t.Context(), 0, func(s client.Snapshot) error { last = s; return nil })
		domains := slices.DeleteFunc(last.Domains, func(d client.Domain) bool {
			return !strings.HasPrefix(d.Name, "instance-") || d.Error != "" || d.Origin == ""
		})
		if err == nil && len(domains) == n {
			return domains
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d domains, want %d: %+v, %v", len(domains), n, last, err)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// tasks returns the folders of a process's threads.
func tasks(t *testing.T, pid int) []string {
	t.Helper()
	all, err := filepath.Glob("/proc/" + strconv.Itoa(pid) + "/task/*")
	check(t, err)
	if len(all) == 0 {
		t.Fatal("the agent has ended")
	}
	return all
}

// kept names the capabilities that a thread has or may take back.
func kept(t *testing.T, task string) []string {
	t.Helper()
	status, err := os.ReadFile(filepath.Join(task, "status"))
	check(t, err)
	var names []string
	for line := range strings.Lines(string(status)) {
		field, value, _ := strings.Cut(line, ":")
		if !slices.Contains([]string{"CapEff", "CapPrm", "CapInh", "CapAmb"}, field) {
			continue
		}
		bits, err := strconv.ParseUint(strings.TrimSpace(value), 16, 64)
		check(t, err)
		for _, c := range capabilities {
			if bits&(1<<c.bit) != 0 && !slices.Contains(names, c.name) {
				names = append(names, c.name)
			}
			bits &^= 1 << c.bit
		}
		if bits != 0 {
			names = append(names, fmt.Sprintf("%s %#x", field, bits))
		}
	}
	return names
}
