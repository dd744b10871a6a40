package host

import (
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/agent"
	"github.com/kvmeter/kvmeter/sample"
)

func TestExamine(t *testing.T) {
	cfg := agent.DefaultConfig()
	cfg.Libvirt, cfg.LibvirtTimeout = agent.Sockets{"/nowhere/libvirt-sock"}, time.Second
	cfg.IPMI.Device = "/nowhere/ipmi0"
	parts := Examine(t.Context(), zap.NewNop(), cfg, true)
	var names []string
	for _, p := range parts {
		names = append(names, p.Name+" "+p.State)
		if (p.State == ok) != (p.Why == "") {
			t.Errorf("%+v: a part says why unless it is ok", p)
		}
	}
	// Whether the kernel describes its types depends on the machine.
	want := []string{"capabilities ok", "processes worse", "network ok", "BMC missing", "libvirt missing"}
	if !slices.Equal(names[1:], want) {
		t.Errorf("parts %v, want the kernel and %v", names, want)
	}
	if b := parts[len(parts)-2]; !strings.Contains(b.Why, "there is no /nowhere/ipmi0") || !slices.Equal(b.Costs, []string{"hardware.*"}) {
		t.Errorf("BMC: %+v", b)
	}
	libvirt := parts[len(parts)-1]
	if !strings.Contains(libvirt.Why, "/nowhere/libvirt-sock") || !slices.Contains(libvirt.Costs, "disk.device.*") || !slices.Contains(libvirt.Costs, "power.state") {
		t.Errorf("libvirt: %+v", libvirt)
	}
	if slices.Contains(libvirt.Costs, sample.NetInBytes.Name) {
		t.Errorf("libvirt is said to cost what netlink counts: %v", libvirt.Costs)
	}
	cfg.Libvirt, cfg.IPMI.Device = nil, ""
	if parts = Examine(t.Context(), zap.NewNop(), cfg, true); !strings.Contains(parts[len(parts)-1].Why, "switched off") {
		t.Errorf("libvirt that is off: %+v", parts[len(parts)-1])
	}
}

// TestExamineTellsOfTheHooksOfLife: whether they can be loaded depends on user and
// kernel.
func TestExamineTellsOfTheHooksOfLife(t *testing.T) {
	cfg := agent.DefaultConfig()
	cfg.Libvirt, cfg.IPMI.Device = nil, ""
	for _, p := range Examine(t.Context(), zap.NewNop(), cfg, false) {
		switch {
		case p.Name != "hooks life":
		case p.State == ok && p.By == string(sample.Free) && p.Why == "":
			return
		case p.State == missing && p.By == "" && strings.HasPrefix(p.Why, "domains are not accounted at their end"):
			return
		default:
			t.Fatalf("got %+v", p)
		}
	}
	t.Error("no part tells of them")
}
