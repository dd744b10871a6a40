// Command kvmeter is the control plane of kvmeter, the all-in-one, and the
// tools of its users.
package main

import (
	"os"
	"path/filepath"
	"slices"

	"github.com/spf13/cobra"

	"github.com/kvmeter/kvmeter/cli"
	"github.com/kvmeter/kvmeter/cmd/internal/config"
	"github.com/kvmeter/kvmeter/cmd/internal/daemon"
)

func command() *cobra.Command {
	root := &cobra.Command{
		Use:   "kvmeter",
		Short: "Meters KVM hosts: CPU, disk and network of every virtual machine, by eBPF and libvirt",
		Long: `kvmeter meters KVM hosts for the people who bill, plan and operate clouds.

Try it on this host, in one process and without a broker:
  kvmeter up          meter this host, store the samples, answer the API
  kvmeter top         watch the domains (in another terminal)
  kvmeter meter-list  ask the API what there is

In a cloud, kvmeter-agent runs on every compute host and sends to RabbitMQ;
kvmeter notifier and kvmeter central run on the control plane.`,
		Version:       daemon.Version(),
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.SetFlagErrorFunc(daemon.FlagError)
	root.AddGroup(&cobra.Group{ID: "daemon", Title: "Programs that run as a service:"}, &cobra.Group{ID: "ask", Title: "Commands that ask:"})
	for _, c := range []*cobra.Command{upCommand(), notifierCommand(), centralCommand()} {
		c.GroupID = "daemon"
		root.AddCommand(c)
	}
	root.AddGroup(&cobra.Group{ID: "keep", Title: "Commands that look after the store:"})
	for _, c := range storeCommands() {
		c.GroupID = "keep"
		root.AddCommand(c)
	}
	root.AddGroup(&cobra.Group{ID: "try", Title: "Commands that try a configuration:"})
	for _, c := range []*cobra.Command{convertCommand(), lintCommand(), pipelineCommand(), publishCommand(), sendSampleCommand()} {
		c.GroupID = "try"
		root.AddCommand(c)
	}
	cli.Add(root, "ask", cli.Options{Socket: sockets()[0], Others: sockets()[1:], DeadLetters: openDead})
	return root
}

// sockets are where an agent may listen: as a daemon or in `kvmeter up`, of
// root or of the user.
func sockets() []string {
	var all []string
	for _, run := range slices.Compact([]string{config.UserDirs(0, os.Getenv).Run, daemon.Dirs().Run}) {
		all = append(all, filepath.Join(run, "agent.sock"), filepath.Join(run, "up", "agent.sock"))
	}
	return all
}
