package all

import (
	"fmt"

	"github.com/kvmeter/kvmeter/bpf"
)

// Life opens the hooks that follow processes from exec to end, pinned in the
// folder pins unless that is empty. It is nil where the kernel refuses them. The
// notes say what is not accounted then, and why.
func Life(pins string) (life *bpf.Life, notes []string) {
	life, err := bpf.OpenLife(bpf.LifeOptions{Pins: pins})
	if err != nil {
		return nil, []string{fmt.Sprintf("domains are not accounted at their end, and what they use after their last sample is missing: %v", err)}
	}
	if err := life.Unkept(); err != nil && pins != "" {
		notes = append(notes, fmt.Sprintf("what domains use that end while no agent runs is not counted: %v", err))
	}
	return life, notes
}
