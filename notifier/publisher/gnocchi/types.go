package gnocchi

import (
	"context"
	"fmt"
	"maps"
	"net/http"
	"slices"

	"go.uber.org/zap"
)

// schema are the attributes of a resource type by their names, and Gnocchi's types
// of them.
type schema map[string]string

// schemas are the resource types that Ceilometer makes in Gnocchi.
var schemas = map[string]schema{
	"instance": {
		"host": text, "image_ref": text, "display_name": text, "flavor_id": text, "flavor_name": text, "server_group": text, "availability_zone": text,
		"launched_at": "datetime", "created_at": "datetime", "deleted_at": "datetime",
	},
	"instance_network_interface": {"name": text, "instance_id": "uuid"},
	"instance_disk":              {"name": text, "instance_id": "uuid"},
	"image":                      {"name": text, "container_format": text, "disk_format": text},
	"volume":                     {"display_name": text, "volume_type": text, "volume_type_id": text, "image_id": "uuid", "instance_id": "uuid"},
	"volume_provider":            {},
	"volume_provider_pool":       {"provider": text},
	"volume_service":             {"host": text, "binary": text, "zone": text, "status": text},
	"swift_account":              {"storage_policy": text},
	"ceph_account":               {},
	"network":                    {},
	"loadbalancer":               {"name": text, "availability_zone": text, "vip_address": text, "provider": text},
	"dns_zone":                   {"zone_name": text, "email": text, "zone_type": text, "pool_id": text},
	"identity":                   {},
	"ipmi":                       {},
	"ipmi_sensor":                {"node": text},
	"stack":                      {},
	"manila_share":               {"name": text, "host": text, "status": text, "availability_zone": text, "protocol": text},
	"nova_compute":               {"host_name": text},
	"host":                       {"host_name": text},
	"host_disk":                  {"host_name": text, "device_name": text},
	"host_network_interface":     {"host_name": text, "device_name": text},
	"switch":                     {"controller": text},
	"switch_port":                {"switch": text, "controller": text, "neutron_port_id": text, "port_number_on_switch": "number"},
	"switch_table":               {"switch": text, "controller": text},
	"port":                       {"controller": text},
}

const text = "string"

// attributeType is an attribute as Gnocchi wants it described.
type attributeType struct {
	Type     string `json:"type"`
	Required bool   `json:"required"` // never: what lacks one is a resource all the same
}

// patch is an operation of JSON Patch, RFC 6902.
type patch struct {
	Op    string        `json:"op"`
	Path  string        `json:"path"`
	Value attributeType `json:"value"`
}

// makeTypes makes the resource types of the definitions that Gnocchi does not have,
// and the attributes that those lack which it has, as ceilometer-upgrade does. Types
// that are not Ceilometer's are their operator's.
func (g *gnocchi) makeTypes(ctx context.Context) error {
	for _, t := range g.resources.types {
		s, ok := schemas[t.name]
		if !ok {
			continue
		}
		err := g.makeType(ctx, t.name, s)
		if isStatus(err, http.StatusForbidden) {
			g.log.Warn("gnocchi:// must not make resource types: ceilometer-upgrade or Gnocchi's client can", zap.String("type", t.name), zap.Error(err))
			return nil
		}
		if err != nil {
			return fmt.Errorf("make resource type %s: %w", t.name, err)
		}
	}
	return nil
}

func (g *gnocchi) makeType(ctx context.Context, name string, s schema) error {
	path := "/v1/resource_type/" + name
	var there struct {
		Attributes map[string]any `json:"attributes"`
	}
	err := g.do(ctx, http.MethodGet, path, nil, &there)
	if isStatus(err, http.StatusNotFound) {
		attributes := map[string]attributeType{}
		for name, kind := range s {
			attributes[name] = attributeType{Type: kind}
		}
		err := g.do(ctx, http.MethodPost, "/v1/resource_type", map[string]any{"name": name, "attributes": attributes}, nil)
		if isStatus(err, http.StatusConflict) { // another notifier was faster
			return nil
		}
		return err
	}
	if err != nil {
		return err
	}
	var missing []patch
	for _, name := range slices.Sorted(maps.Keys(s)) {
		if _, ok := there.Attributes[name]; !ok {
			missing = append(missing, patch{"add", "/attributes/" + name, attributeType{Type: s[name]}})
		}
	}
	if missing == nil {
		return nil
	}
	return g.send(ctx, http.MethodPatch, path, "application/json-patch+json", missing, nil)
}
