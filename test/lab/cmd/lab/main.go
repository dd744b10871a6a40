// Command lab makes and ends a compute node to try things on: see lab --help.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/sync/errgroup"

	"github.com/kvmeter/kvmeter/test/lab"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := command().ExecuteContext(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "lab:", err)
		os.Exit(1)
	}
}

func command() *cobra.Command {
	var dir string
	open := func() (*lab.Lab, error) { return lab.New(dir, lab.Options{Log: newLogger()}) }
	root := &cobra.Command{
		Use:   "lab",
		Short: "A private compute node: libvirtd, QEMU guests and RabbitMQ, beside whatever the machine runs",
		Long: `A private compute node: a libvirtd of its own, QEMU guests that do exactly what
they are told, and a RabbitMQ node of its own. The machine's own libvirt and
/etc are not touched, and several labs can run at once, each in a folder.

Guests are named by number (1), libvirt's name (instance-00000001) or UUID.
  Linux guests run under TCG and obey commands (lab exec --help).
  KVM guests run a ROM of a few instructions: idle, burn, pulse or disk.`,
		Example: `  lab up --vms 3 --kvm 2
  lab exec 1 -- write 65536 512
  lab send 1 2000 100
  lab list
  lab down`,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.PersistentFlags().StringVar(&dir, "dir", defaultDir(), "the lab's folder; also $KVMETER_LAB")
	root.AddCommand(
		upCommand(open), downCommand(open), listCommand(open), execCommand(open), sendCommand(open),
		guestCommand(open, "pause", "Stop a guest's CPUs", (*lab.Guest).Pause),
		guestCommand(open, "resume", "Let a paused guest's CPUs run again", (*lab.Guest).Resume),
		guestCommand(open, "destroy", "End a guest and remove it with its disks", (*lab.Guest).Destroy),
		rabbitCommand(open), packagesCommand(),
	)
	return root
}

type opener func() (*lab.Lab, error)

func defaultDir() string {
	if dir := os.Getenv("KVMETER_LAB"); dir != "" {
		return dir
	}
	return ".lab"
}

func newLogger() *zap.Logger {
	enc := zapcore.EncoderConfig{MessageKey: "msg", EncodeDuration: zapcore.StringDurationEncoder}
	return zap.New(zapcore.NewCore(zapcore.NewConsoleEncoder(enc), zapcore.Lock(os.Stderr), zapcore.InfoLevel))
}

func upCommand(open opener) *cobra.Command {
	var vms, kvm, vcpus int
	var mode, load string
	var disks []string
	var rabbit bool
	c := &cobra.Command{
		Use:   "up",
		Short: "Start what is missing of a lab, and leave it running",
		Long: `Start libvirtd and as many guests as asked for, or as many more as are missing,
and leave them running. The first time it fetches a kernel (27 MB) and builds the
guests' images into the user's cache folder.

--disk gives each new guest a disk, and may be repeated: FORMAT[,CACHE[,AIO[,MIB]]]
with raw or qcow2; none, writeback, directsync, writethrough or unsafe; native,
threads or io_uring. Without it there is one raw disk of 64 MiB with none,native.
--load is a command that Linux guests do in the background, see lab exec --help.`,
		Example: `  lab up --vms 3
  lab up --vms 2 --load "mix 30 100 200 0"
  lab up --kvm 20 --mode idle
  lab up --vms 1 --disk raw --disk qcow2,none,io_uring --disk raw,writeback,threads,256`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx := cmd.Context()
			l, err := open()
			if err != nil {
				return err
			}
			parsed, err := parseDisks(disks)
			if err != nil {
				return err
			}
			if err := l.StartLibvirt(ctx); err != nil {
				return err
			}
			linux, err := wanted(ctx, l, vms, lab.GuestSpec{Kind: lab.Linux, VCPUs: vcpus, Disks: parsed})
			if err != nil {
				return err
			}
			roms, err := wanted(ctx, l, kvm, lab.GuestSpec{Kind: lab.KVM, Mode: mode, VCPUs: vcpus, Disks: parsed})
			if err != nil {
				return err
			}
			started := startAll(ctx, append(linux, roms...), load)
			out := cmd.OutOrStdout()
			if rabbit {
				r, err := l.RabbitMQ(ctx)
				if err != nil {
					return err
				}
				fmt.Fprintf(out, "RabbitMQ  %s\n", r.URL())
			}
			fmt.Fprintf(out, "libvirt   %s\nread-only %s\nby hand   virsh -c 'qemu+unix:///system?socket=%s' list\n\n",
				l.Socket(), l.ReadOnlySocket(), l.Socket())
			if err := list(out, l); err != nil {
				return err
			}
			fmt.Fprintf(out, "\nTry       lab --dir %s exec 1 -- write 65536 512\nEnd with  lab --dir %s down\n", l.Dir(), l.Dir())
			return started
		},
	}
	f := c.Flags()
	f.IntVar(&vms, "vms", 0, "Linux guests that are to run")
	f.IntVar(&kvm, "kvm", 0, "KVM guests that are to run")
	f.StringVar(&mode, "mode", "idle", "of new KVM guests: "+strings.Join(lab.Modes, ", "))
	f.StringVar(&load, "load", "", "command for new Linux guests, in the background")
	f.IntVar(&vcpus, "vcpus", 1, "vCPUs of new guests")
	f.StringArrayVar(&disks, "disk", nil, "a disk of new guests: FORMAT[,CACHE[,AIO[,MIB]]]")
	f.BoolVar(&rabbit, "rabbitmq", false, "start a RabbitMQ node as well")
	return c
}

// wanted are the first n guests of the spec's kind, made now if there are fewer.
func wanted(ctx context.Context, l *lab.Lab, n int, spec lab.GuestSpec) ([]*lab.Guest, error) {
	all, err := l.Guests()
	if err != nil {
		return nil, err
	}
	var guests []*lab.Guest
	for _, g := range all {
		if g.Spec.Kind == spec.Kind && len(guests) < n {
			guests = append(guests, g)
		}
	}
	for len(guests) < n {
		g, err := l.NewGuest(ctx, spec)
		if err != nil {
			return nil, err
		}
		guests = append(guests, g)
	}
	return guests, nil
}

// startAll starts the guests that do not run; one that cannot be started costs
// no other. Linux guests get the load.
func startAll(ctx context.Context, guests []*lab.Guest, load string) error {
	errs := make([]error, len(guests))
	var group errgroup.Group
	group.SetLimit(4) // more at once only wait for each other
	for i, g := range guests {
		if g.Running() {
			continue
		}
		group.Go(func() error {
			errs[i] = g.Start(ctx)
			if errs[i] == nil && load != "" && g.Spec.Kind == lab.Linux {
				_, errs[i] = g.Exec(ctx, "bg "+load)
			}
			return nil
		})
	}
	_ = group.Wait()
	return errors.Join(errs...)
}

func parseDisks(args []string) ([]lab.Disk, error) {
	var disks []lab.Disk
	for _, arg := range args {
		part := append(strings.Split(arg, ","), "", "", "")
		d := lab.Disk{Format: part[0], Cache: part[1], AIO: part[2]}
		if part[3] != "" {
			var err error
			if d.SizeMiB, err = strconv.Atoi(part[3]); err != nil || d.SizeMiB < 1 {
				return nil, fmt.Errorf("disk %q: %q is no size in MiB", arg, part[3])
			}
		}
		disks = append(disks, d)
	}
	return disks, nil
}

func downCommand(open opener) *cobra.Command {
	return &cobra.Command{
		Use:   "down",
		Short: "End all that runs in a lab and remove its files",
		Long: `End all that runs in a lab and remove its files, whoever started it and even
when that ended half way. It ends what bears this lab's id, and nothing else.`,
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			l, err := open()
			if err != nil {
				return err
			}
			return l.Close()
		},
	}
}

func listCommand(open opener) *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "Show a lab's guests",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			l, err := open()
			if err != nil {
				return err
			}
			return list(cmd.OutOrStdout(), l)
		},
	}
}

func list(out io.Writer, l *lab.Lab) error {
	guests, err := l.Guests()
	if err != nil {
		return err
	}
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "NUMBER\tNAME\tUUID\tKIND\tPID\tVCPUS\tDISKS\tTAPS")
	for _, g := range guests {
		kind, pid := string(g.Spec.Kind), "off"
		if g.Spec.Mode != "" {
			kind += " " + g.Spec.Mode
		}
		if p := g.PID(); p != 0 {
			pid = strconv.Itoa(p)
		}
		var disks, taps []string
		for _, d := range g.Spec.Disks {
			disks = append(disks, d.Format+","+d.Cache+","+d.AIO)
		}
		for _, n := range g.NICs() {
			taps = append(taps, n.Tap)
		}
		fmt.Fprintf(w, "%d\t%s\t%s\t%s\t%s\t%d\t%s\t%s\n", g.Number(), g.Name, g.UUID, kind, pid, g.Spec.VCPUs,
			strings.Join(disks, " "), strings.Join(taps, " "))
	}
	return w.Flush()
}

func execCommand(open opener) *cobra.Command {
	return &cobra.Command{
		Use:   "exec GUEST -- COMMAND",
		Short: "Have a Linux guest do one command, and wait for its end",
		Long: `Have a Linux guest do one command exactly, and wait for its end:

  write BS COUNT [FIRST] [DISK]  COUNT requests of BS bytes (at most 262144), from block FIRST on
  read BS COUNT [FIRST] [DISK]   the same, reading
  flush [DISK]                   one flush
  udp COUNT SIZE [NIC]           send COUNT frames of 42 + SIZE bytes; nothing comes back
  cpu PCT SECONDS                be busy PCT % of the time; 0 seconds is for ever
  cpusec SECONDS                 use so much CPU time by the guest's own account
  mix PCT IOPS PPS SECONDS       a load to look at: CPU, disk writes, network
  mem MIB                        hold so much memory in use; 0 gives it back
  stat                           show the guest's own counters
  off                            power off

DISK is vda, vdb, …; NIC is eth0, eth1, …. "bg COMMAND" returns at once and runs
beside the others.`,
		Example: "  lab exec 1 -- write 65536 512\n  lab exec 1 -- bg mix 30 100 200 0\n  lab exec 2 -- read 4096 1000 vdb",
		Args:    cobra.MinimumNArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			g, err := find(open, args[0])
			if err != nil {
				return err
			}
			out, err := g.Exec(cmd.Context(), strings.Join(args[1:], " "))
			if err == nil && out != "" {
				fmt.Fprintln(cmd.OutOrStdout(), out)
			}
			return err
		},
	}
}

func sendCommand(open opener) *cobra.Command {
	return &cobra.Command{
		Use:     "send GUEST COUNT SIZE",
		Short:   "Send COUNT UDP frames of 42 + SIZE bytes to a Linux guest, which answers none",
		Example: "  lab send 1 2000 100",
		Args:    cobra.ExactArgs(3),
		RunE: func(cmd *cobra.Command, args []string) error {
			g, err := find(open, args[0])
			if err != nil {
				return err
			}
			count, err := strconv.Atoi(args[1])
			if err != nil {
				return fmt.Errorf("%q is no count", args[1])
			}
			size, err := strconv.Atoi(args[2])
			if err != nil {
				return fmt.Errorf("%q is no size", args[2])
			}
			return g.SendUDP(cmd.Context(), count, size)
		},
	}
}

func guestCommand(open opener, name, short string, do func(*lab.Guest, context.Context) error) *cobra.Command {
	return &cobra.Command{
		Use:   name + " GUEST",
		Short: short,
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			g, err := find(open, args[0])
			if err != nil {
				return err
			}
			return do(g, cmd.Context())
		},
	}
}

func find(open opener, guest string) (*lab.Guest, error) {
	l, err := open()
	if err != nil {
		return nil, err
	}
	return l.Guest(guest)
}

func rabbitCommand(open opener) *cobra.Command {
	c := &cobra.Command{
		Use:   "rabbitmq",
		Short: "Start or end a RabbitMQ node of the lab's own; needs neither root nor guests",
	}
	c.AddCommand(&cobra.Command{
		Use:   "up",
		Short: "Start the node, with the data it has, and print its URL",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			l, err := open()
			if err != nil {
				return err
			}
			r, err := l.RabbitMQ(cmd.Context())
			if err != nil {
				return err
			}
			out := cmd.OutOrStdout()
			fmt.Fprintln(out, r.URL())
			fmt.Fprintf(out, "by hand   env %s %s list_queues\n", strings.Join(r.Env(), " "), lab.RabbitMQCtl)
			return nil
		},
	}, &cobra.Command{
		Use:   "down",
		Short: "End the node in good order; its data stay",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			l, err := open()
			if err != nil {
				return err
			}
			return l.StopRabbitMQ(cmd.Context())
		},
	})
	return c
}

func packagesCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "packages",
		Short: "Print the Debian packages that a lab needs, on one line",
		Args:  cobra.NoArgs,
		Run: func(cmd *cobra.Command, _ []string) {
			fmt.Fprintln(cmd.OutOrStdout(), strings.Join(lab.Packages, " "))
		},
	}
}
