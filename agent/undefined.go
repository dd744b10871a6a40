package agent

import (
	"encoding/json"

	"github.com/kvmeter/kvmeter/collectors"
)

// undefined is what is known of a domain without libvirt.
func undefined(d *domain, host string, taps []string) *collectors.Definition {
	def := &collectors.Definition{UUID: d.uuid, Name: d.name, State: unknownState}
	m := struct {
		Name         string `json:"name"`
		InstanceID   string `json:"instance_id"`
		InstanceHost string `json:"instance_host"`
		VNICName     string `json:"vnic_name,omitempty"`
	}{Name: d.name, InstanceID: d.uuid, InstanceHost: host}
	def.Metadata, _ = json.Marshal(m) // texts only
	for _, tap := range taps {
		m.Name, m.VNICName = tap, tap
		n := collectors.NIC{Device: tap, Resource: d.name + "-" + d.uuid + "-" + tap}
		n.Metadata, _ = json.Marshal(m)
		def.NICs = append(def.NICs, n)
	}
	return def
}
