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

// Rabbit is the lab's RabbitMQ node. It listens on loopback only, runs as
// whoever starts it, and needs neither root nor libvirt.
type Rabbit struct {
	lab   *Lab
	ports rabbitPorts
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
	if _, err := os.Stat(rabbitServer); err != nil {
		return nil, fmt.Errorf("start RabbitMQ: no %s: apt-get install rabbitmq-server", rabbitServer)
	}
	if err := os.MkdirAll(l.path("rabbitmq"), 0o755); err != nil {
		return nil, fmt.Errorf("start RabbitMQ: %w", err)
	}
	r := &Rabbit{lab: l}
	err := readJSON(r.file("ports.json"), &r.ports)
	if errors.Is(err, fs.ErrNotExist) {
		if r.ports, err = freePorts(); err == nil {
			err = writeJSON(r.file("ports.json"), r.ports)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("start RabbitMQ: %w", err)
	}
	return r, r.Start(ctx)
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

func (r *Rabbit) file(name string) string { return r.lab.path("rabbitmq", name) }

// URL is where the node is, with its user guest.
func (r *Rabbit) URL() string { return fmt.Sprintf("amqp://guest:guest@127.0.0.1:%d/", r.ports.AMQP) }

// Node is the node's name, for rabbitmqctl.
func (r *Rabbit) Node() string { return "kvmeter-" + r.lab.id + "@localhost" }

// Env is the environment in which [RabbitMQCtl] and its like find this node.
func (r *Rabbit) Env() []string {
	return []string{
		"HOME=" + r.file(""),
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
	running, err := r.lab.processes(isBroker)
	if err != nil {
		return err
	}
	if len(running) > 0 {
		return r.waitReady(ctx, nil)
	}
	for name, text := range map[string]string{
		"rabbitmq-env.conf": "",
		"enabled_plugins":   "[].\n",
		// A quorum queue's log is made at its full size; the default is 512 MB.
		"rabbitmq.conf": fmt.Sprintf("listeners.tcp.1 = 127.0.0.1:%d\nraft.wal_max_size_bytes = 33554432\n", r.ports.AMQP),
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
	found, err := r.lab.processes(isBroker)
	if err != nil || len(found) == 0 {
		return 0
	}
	return found[0].pid
}

// Kill9 kills the broker with SIGKILL; its data stay for [Rabbit.Start].
func (r *Rabbit) Kill9(ctx context.Context) error {
	if err := r.lab.kill(ctx, "RabbitMQ", isBroker); err != nil {
		return fmt.Errorf("kill RabbitMQ: %w", err)
	}
	return nil
}

// Stop ends the broker in good order, and its epmd; the data stay.
func (r *Rabbit) Stop(ctx context.Context) error { return r.lab.StopRabbitMQ(ctx) }

// StopRabbitMQ ends the lab's node, if it runs, in good order; its data stay.
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
