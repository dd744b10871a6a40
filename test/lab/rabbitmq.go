package lab

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"go.uber.org/zap"
)

// Rabbit is a RabbitMQ node of the lab. It listens on loopback only, runs as
// whoever starts it, and needs neither root nor libvirt.
type Rabbit struct {
	lab     *Lab
	index   int // of the node in its cluster
	ports   rabbitPorts
	options RabbitOptions
}

// RabbitOptions say how the lab's nodes of RabbitMQ are set up. The zero value
// is one node.
type RabbitOptions struct {
	// Nodes is the number of nodes of the cluster.
	Nodes int
	// Config are further lines of rabbitmq.conf.
	Config string
	// Plugins are enabled.
	Plugins []string
}

// rabbitPorts are chosen once, so that a node comes back where it was.
type rabbitPorts struct{ AMQP, Dist, EPMD int }

// RabbitMQCtl is the rabbitmqctl that looks for the cookie where [Rabbit.Env]
// says. Debian's in /usr/sbin change to the user rabbitmq first.
const (
	RabbitMQCtl  = "/usr/lib/rabbitmq/bin/rabbitmqctl"
	rabbitServer = "/usr/lib/rabbitmq/bin/rabbitmq-server"
)

// RabbitMQ starts the lab's node, unless it runs, and returns when it answers.
func (l *Lab) RabbitMQ(ctx context.Context) (*Rabbit, error) {
	nodes, err := l.RabbitMQNodes(ctx, RabbitOptions{})
	if err != nil {
		return nil, err
	}
	return nodes[0], nil
}

// RabbitMQNodes starts a cluster of nodes, unless they run, and returns when all
// answer and know each other.
func (l *Lab) RabbitMQNodes(ctx context.Context, options RabbitOptions) ([]*Rabbit, error) {
	if _, err := os.Stat(rabbitServer); err != nil {
		return nil, fmt.Errorf("start RabbitMQ: no %s: apt-get install rabbitmq-server", rabbitServer)
	}
	options.Nodes = max(1, options.Nodes)
	nodes := make([]*Rabbit, options.Nodes)
	for i := range nodes {
		r := &Rabbit{lab: l, index: i, options: options}
		if err := r.prepare(nodes[0]); err != nil {
			return nil, fmt.Errorf("start RabbitMQ: %w", err)
		}
		nodes[i] = r
	}
	// The first node makes the cluster, the others join it: side by side they
	// would draw lots for who does.
	for _, r := range nodes {
		if err := r.Start(ctx); err != nil {
			return nil, err
		}
	}
	return nodes, nil
}

// prepare makes the node's folder and chooses its ports. The nodes of a cluster
// have epmd and the cookie of the first.
func (r *Rabbit) prepare(first *Rabbit) error {
	if err := os.MkdirAll(r.file(""), 0o755); err != nil {
		return err
	}
	err := readJSON(r.file("ports.json"), &r.ports)
	if errors.Is(err, fs.ErrNotExist) {
		if r.ports, err = freePorts(); err != nil {
			return err
		}
		if first != nil {
			r.ports.EPMD = first.ports.EPMD
		}
		return writeJSON(r.file("ports.json"), r.ports)
	}
	return err
}

// freePorts finds ports that nobody listens on at the moment.
func freePorts() (rabbitPorts, error) {
	var ports [3]int
	for i := range ports {
		lis, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return rabbitPorts{}, fmt.Errorf("find a free port: %w", err)
		}
		defer func() { _ = lis.Close() }()
		ports[i] = lis.Addr().(*net.TCPAddr).Port
	}
	return rabbitPorts{AMQP: ports[0], Dist: ports[1], EPMD: ports[2]}, nil
}

func (r *Rabbit) file(name string) string { return r.lab.path(r.folder(), name) }

func (r *Rabbit) folder() string {
	if r.index == 0 {
		return "rabbitmq"
	}
	return fmt.Sprintf("rabbitmq-%d", r.index)
}

// URL is where the node is, with its user guest.
func (r *Rabbit) URL() string { return fmt.Sprintf("amqp://guest:guest@127.0.0.1:%d/", r.ports.AMQP) }

// Node is the node's name, for rabbitmqctl.
func (r *Rabbit) Node() string { return r.node(r.index) }

func (r *Rabbit) node(index int) string {
	return fmt.Sprintf("kvmeter-%s-%d@localhost", r.lab.id, index)
}

func (r *Rabbit) isBroker(p process) bool { return isBroker(p) && p.has("RABBITMQ_NODENAME", r.Node()) }

// Env is the environment in which [RabbitMQCtl] and its like find this node.
func (r *Rabbit) Env() []string {
	return []string{
		"HOME=" + r.lab.path("rabbitmq"), // where the cookie is
		fmt.Sprintf("ERL_EPMD_PORT=%d", r.ports.EPMD),
		"ERL_EPMD_ADDRESS=127.0.0.1",
		"RABBITMQ_NODENAME=" + r.Node(),
		// An empty one: the machine's own must not be read.
		"RABBITMQ_CONF_ENV_FILE=" + r.file("rabbitmq-env.conf"),
	}
}

// Start starts the node with the data it has, unless it runs, and returns when
// it answers.
func (r *Rabbit) Start(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	if err := r.start(ctx); err != nil {
		return fmt.Errorf("start RabbitMQ: %w\n%s%s", err, tail(r.file("stderr")), tail(r.file("stdout")))
	}
	return nil
}

func (r *Rabbit) start(ctx context.Context) error {
	running, err := r.lab.processes(r.isBroker)
	if err != nil {
		return err
	}
	if len(running) > 0 {
		return r.waitReady(ctx, nil)
	}
	for name, text := range map[string]string{
		"rabbitmq-env.conf": "",
		"enabled_plugins":   "[" + strings.Join(r.options.Plugins, ",") + "].\n",
		"rabbitmq.conf":     r.config(),
	} {
		if err := os.WriteFile(r.file(name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	env := append(r.Env(),
		"PATH="+os.Getenv("PATH"), "LANG=C.UTF-8", idVariable+"="+r.lab.id,
		"RABBITMQ_BASE="+r.file(""),
		"RABBITMQ_MNESIA_BASE="+r.file("mnesia"),
		"RABBITMQ_LOG_BASE="+r.file("log"),
		"RABBITMQ_CONFIG_FILE="+r.file("rabbitmq.conf"),
		"RABBITMQ_ADVANCED_CONFIG_FILE="+r.file("advanced.config"),
		"RABBITMQ_GENERATED_CONFIG_DIR="+r.file("config"),
		"RABBITMQ_ENABLED_PLUGINS_FILE="+r.file("enabled_plugins"),
		"RABBITMQ_PID_FILE="+r.file("pid"),
		fmt.Sprintf("RABBITMQ_NODE_PORT=%d", r.ports.AMQP),
		"RABBITMQ_NODE_IP_ADDRESS=127.0.0.1",
		fmt.Sprintf("RABBITMQ_DIST_PORT=%d", r.ports.Dist),
		"RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS=-kernel inet_dist_use_interface {127,0,0,1}",
		// The script becomes the broker instead of waiting for it.
		"RUNNING_UNDER_SYSTEMD=true",
	)
	epmds, err := r.lab.processes(isEPMD)
	if err != nil {
		return err
	}
	if len(epmds) == 0 {
		epmd := exec.Command("epmd", "-port", fmt.Sprint(r.ports.EPMD), "-address", "127.0.0.1")
		if _, err := r.spawn(epmd, env); err != nil {
			return err
		}
	}
	ended, err := r.spawn(exec.Command(rabbitServer), env)
	if err != nil {
		return err
	}
	if err := r.waitReady(ctx, ended); err != nil {
		return err
	}
	r.lab.log.Info("RabbitMQ runs", zap.String("url", r.URL()))
	return nil
}

func (r *Rabbit) config() string {
	// A quorum queue's log is made at its full size; the default is 512 MB.
	text := fmt.Sprintf("listeners.tcp.1 = 127.0.0.1:%d\nraft.wal_max_size_bytes = 33554432\n", r.ports.AMQP)
	if r.options.Nodes > 1 {
		text += "cluster_formation.peer_discovery_backend = classic_config\n" +
			"cluster_formation.randomized_startup_delay_range.min = 0\n" +
			"cluster_formation.randomized_startup_delay_range.max = 1\n"
		for i := range r.options.Nodes {
			text += fmt.Sprintf("cluster_formation.classic_config.nodes.%d = %s\n", i+1, r.node(i))
		}
	}
	return text + r.options.Config
}

// spawn starts a process that outlives this one; ended is closed at its end.
func (r *Rabbit) spawn(cmd *exec.Cmd, env []string) (ended <-chan struct{}, err error) {
	stdout, err := os.OpenFile(r.file("stdout"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return nil, err
	}
	defer func() { _ = stdout.Close() }()
	stderr, err := os.OpenFile(r.file("stderr"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return nil, err
	}
	defer func() { _ = stderr.Close() }()
	cmd.Env, cmd.Dir = env, r.file("")
	cmd.Stdout, cmd.Stderr = stdout, stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = cmd.Wait() // how it ended is in its log
	}()
	return done, nil
}

func (r *Rabbit) waitReady(ctx context.Context, ended <-chan struct{}) error {
	var last error
	err := poll(ctx, func() bool {
		select {
		case <-ended:
			last = errors.New("it has ended at once")
			return true
		default:
		}
		var conn *amqp.Connection
		if conn, last = amqp.Dial(r.URL()); last != nil {
			return false
		}
		last = conn.Close()
		return true
	})
	return errors.Join(err, last)
}

// PID is the broker's process id, 0 when it does not run.
func (r *Rabbit) PID() int {
	found, err := r.lab.processes(r.isBroker)
	if err != nil || len(found) == 0 {
		return 0
	}
	return found[0].pid
}

// Kill9 kills the broker with SIGKILL; its data stay for [Rabbit.Start].
func (r *Rabbit) Kill9(ctx context.Context) error {
	if err := r.lab.kill(ctx, "RabbitMQ", r.isBroker); err != nil {
		return fmt.Errorf("kill RabbitMQ: %w", err)
	}
	return nil
}

// Stop ends all nodes in good order, and their epmd; the data stay.
func (r *Rabbit) Stop(ctx context.Context) error { return r.lab.StopRabbitMQ(ctx) }

// StopRabbitMQ ends the lab's nodes that run, in good order; their data stay.
func (l *Lab) StopRabbitMQ(ctx context.Context) error {
	// epmd after the broker, which would miss it.
	if err := errors.Join(l.end(ctx, "RabbitMQ", isBroker), l.end(ctx, "epmd", isRabbits)); err != nil {
		return fmt.Errorf("stop RabbitMQ: %w", err)
	}
	return nil
}

// isRabbits is true of the broker, its helpers and epmd.
func isRabbits(p process) bool {
	return isEPMD(p) || isBroker(p) || strings.HasPrefix(p.name(), "erl_") || strings.HasPrefix(p.name(), "inet_gethost")
}
