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
	"domain": "UUID of the domain",
	"nic":    "Nova's filterref, else libvirt name, `-`, UUID, `-`, tap device",
	"disk":   "UUID, `-`, target device (`vda`)",
}

func meters() []byte {
	var b bytes.Buffer
	b.WriteString(`# Meters

Generated from the catalogue (` + "`sample/catalogue.go`" + `). Names never change their meaning.

An origin is who counted: ` + "`walk`" + ` and ` + "`iter`" + ` are BPF programs that read the kernel's own accounting of each
thread, ` + "`cpuclock`" + ` the process CPU clock and /proc, ` + "`rtnl`" + ` the kernel's link statistics, ` + "`libvirt`" + ` libvirt's domain
statistics. The first origin that works counts; the next ones take over. Meters marked with * make QEMU work for each
reading: a wildcard in polling.yaml polls them every 300 s at most, naming them polls them as often as asked.

A counter is of one incarnation of what holds it (the QEMU process, the NIC, the disk) and starts at zero with it.

| meter | type | unit | resource id | origins | meaning |
|---|---|---|---|---|---|
`)
	for _, m := range sample.Catalogue {
		name := "`" + m.Name + "`"
		if m.QEMU {
			name += " *"
		}
		origins := make([]string, len(m.Origins))
		for i, o := range m.Origins {
			origins[i] = string(o)
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %s | %s |\n", name, m.Kind, m.Unit, resources[m.Resource], strings.Join(origins, ", "), m.Help)
	}
	b.WriteString(`
**Host side and guest side of a disk differ.** ` + "`disk.device.*`" + ` is what the guest asked for, as QEMU counts it.
` + "`disk.host.*`" + ` is what the QEMU process moved to and from storage: with qcow2 it includes the image's own tables, and
reads that the host's page cache answers are not in it. Neither is derived from the other.

**Packets** are those that cross the tap device: one that the guest leaves to its network card to split counts once.
`)
	return b.Bytes()
}
