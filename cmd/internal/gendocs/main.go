// Command gendocs writes the generated pages of docs/ into the folder that is
// its argument.
package main

import (
	"bytes"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"strings"

	"github.com/kvmeter/kvmeter/sample"
)

func main() {
	if len(os.Args) != 2 {
		log.Fatal("usage: gendocs DOCS-FOLDER")
	}
	docs := filepath.Clean(os.Args[1])
	all, err := pages(filepath.Dir(docs))
	if err != nil {
		log.Fatal(err)
	}
	for name, page := range all {
		if err := os.WriteFile(filepath.Join(docs, name), page, 0o644); err != nil {
			log.Fatal(err)
		}
	}
}

// pages returns the pages by name. The module's source is below root.
func pages(root string) (map[string][]byte, error) {
	settings, err := configPage(root)
	if err != nil {
		return nil, err
	}
	own, err := metricsPage()
	if err != nil {
		return nil, err
	}
	return map[string][]byte{"meters.md": meters(), "config.md": settings, "metrics.md": own}, nil
}

// resources says what the resource ids of the catalogue look like.
var resources = map[string]string{
	"domain":   "UUID of the domain",
	"nic":      "Nova's filterref, else libvirt name, `-`, UUID, `-`, tap device",
	"disk":     "UUID, `-`, target device (`vda`)",
	"sensor":   "node, `-`, sensor such as `cpu1_temp_(0x1)`",
	"host":     "node",
	"chassis":  "node, `-chassis`",
	"sel":      "node, `-sel`",
	"selevent": "node, `-sel-event`",
	"vcpu":     "UUID, `-vcpu`, number",
}

func meters() []byte {
	var b bytes.Buffer
	b.WriteString(`# Meters

Generated from the catalogue (` + "`sample/catalogue.go`" + `). Names never change their meaning.

An origin is who counted: ` + "`walk`" + ` and ` + "`iter`" + ` are BPF programs that read the kernel's own accounting of each
thread, ` + "`cpuclock`" + ` the process CPU clock and /proc, ` + "`kvm`" + ` a BPF program that reads KVM's
statistics of each vCPU, ` + "`proc`" + ` /proc/PID/stat, ` + "`rtnl`" + ` the kernel's link statistics, ` + "`iomap`" + ` BPF programs
where the kernel takes and completes I/O, ` + "`tcx`" + ` a BPF program on the packets of a tap device ([hooks.md](hooks.md)),
` + "`libvirt`" + ` libvirt's domain statistics. The first origin that works counts; the next ones take over (see [crosscheck.md](crosscheck.md)). Meters marked with *
make libvirt ask for each reading, most of them QEMU: a wildcard in polling.yaml polls them every 300 s at most, naming them polls them as often
as asked.

A counter is of one incarnation of what holds it (the QEMU process, the NIC, the disk) and starts at zero with it.

| meter | type | unit | resource id | origins | meaning |
|---|---|---|---|---|---|
`)
	meterRows(&b, false)
	b.WriteString(`
## Of older releases of Ceilometer

Wildcards in polling.yaml match these only where the setting ` + "`legacy_meters`" + ` is true or has their names or patterns; one
that polling.yaml names is polled in any case. Rates and other changes are of the time since the poll before of the same
interval, so that the first poll of a domain has none.

| meter | type | unit | resource id | origins | meaning |
|---|---|---|---|---|---|
`)
	meterRows(&b, true)
	b.WriteString(meterNotes)
	return b.Bytes()
}

// meterRows adds the rows of the table of those meters that are legacy, or not.
func meterRows(b *bytes.Buffer, legacy bool) {
	for _, m := range sample.Catalogue {
		if m.Legacy != legacy {
			continue
		}
		if m.Check != nil && m != m.Check.Difference {
			continue // the text below tells of them
		}
		name, help := "`"+m.Name+"`", m.Help
		if m.Event != "" {
			help += " Also an event, `" + m.Event + "`."
		}
		if m.Parts != "" {
			name, help = "`"+m.Name+".…`", m.Help+" Its members' names end with "+m.Parts+"."
			if m.Total {
				name = "`" + m.Name + "`, " + name
			}
		}
		if m.QEMU {
			name += " *"
		}
		origins := make([]string, len(m.Origins))
		for i, o := range m.Origins {
			origins[i] = string(o)
		}
		fmt.Fprintf(b, "| %s | %s | %s | %s | %s | %s |\n", name, m.Kind, m.Unit, resources[m.Resource], strings.Join(origins, ", "), help)
	}
}

const meterNotes = `
**Comparisons.** Each meter ` + "`check.…`" + ` has two more beside it, also gauges of origin ` + "`libvirt`" + `: ` + "`….relative`" + ` is the
same difference in parts of the greater figure (-1 to 1), and ` + "`….verdict`" + ` is 0 where both agree, 1 where they differ by more
than the tolerance, and 2 where they cannot be compared. They come at the cadence of ` + "`crosscheck_interval`" + `; see
[crosscheck.md](crosscheck.md).

**Host side and guest side of a disk differ.** ` + "`disk.device.*`" + ` is what the guest asked for, as QEMU counts it.
` + "`disk.host.*`" + ` is what the QEMU process moved to and from storage: with qcow2 it includes the image's own tables, and
reads that the host's page cache answers are not in it. Neither is derived from the other; [disk.md](disk.md) says which
sees what.

**The host's own hardware** (` + "`hardware.ipmi.*`" + `) is read from its BMC, see [ipmi.md](ipmi.md). Readings have their sensor's unit.

**Packets** are those that cross the tap device: one that the guest leaves to its network card to split counts once.

**Memory and size.** ` + "`vcpus`, `memory`, `power.state`, `disk.root.size` and `disk.ephemeral.size`" + ` follow libvirt's events and
definitions; nobody is asked for them at a poll. Without a balloon device ` + "`memory`" + ` is all that the domain has, and of the
others only ` + "`memory.resident`" + ` is there. What the guest's balloon driver tells needs a driver, and a period at which it is
asked (` + "`<memballoon><stats period='10'/>`" + `, which Nova sets). Units are MiB and GiB, as in Ceilometer 2026.1 and newer; with the
setting ` + "`legacy_units`" + ` they are called MB and GB, as before, and the numbers are the same. ` + "`perf.*`" + ` is there for domains that have
` + "`<perf>`" + ` events enabled.
`
