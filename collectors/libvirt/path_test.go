package libvirt

import (
	"encoding/json"
	"strings"
	"testing"

	golibvirt "github.com/digitalocean/go-libvirt"
	"github.com/google/go-cmp/cmp"
)

const ownedXML = `<domain><name>db1</name><uuid>c0ffee00-1111-4222-8333-444455556666</uuid>
<title> billing / db </title><vcpu current="1">4</vcpu><memory unit="GiB">2</memory><currentMemory>1048576</currentMemory>
<metadata>
 <o:owner xmlns:o="http://example.org/owner" team="blue"><o:project uuid=" p-1 "/><o:user>alice</o:user></o:owner>
 <t:tags xmlns:t="http://example.org/tags">
  <t:tag key="metering.stack" value="prod"/><t:tag name="metering.tier.of">gold€</t:tag><t:tag key="cost">7</t:tag><t:tag key="secret">x</t:tag>
 </t:tags>
</metadata><perf><event name="cmt" enabled="no"/><event name="cpu_cycles" enabled="yes"/></perf></domain>`

func TestDomainsThatNovaDidNotMake(t *testing.T) {
	reserved := Reserved{Namespaces: []string{"metering."}, Length: 256}
	for name, tc := range map[string]struct {
		opts                   Options
		project, user, display string
		metadata               string // user_metadata
	}{
		"have their title as their display name": {Options{}, "", "", "billing / db", "null"},
		"have the owner that an element or attribute names": {
			Options{OwnerProject: "metadata/owner/project/@uuid", OwnerUser: "metadata/owner/user"}, "p-1", "alice", "billing / db", "null",
		},
		"may have their title for an owner":              {Options{OwnerProject: "title"}, "billing / db", "", "billing / db", "null"},
		"have none where the path leads nowhere":         {Options{OwnerProject: "metadata/owner/@nobody", OwnerUser: "a/b/c"}, "", "", "billing / db", "null"},
		"have the user metadata of reserved namespaces":  {Options{UserMetadata: "metadata/tags/tag", Reserved: reserved}, "", "", "billing / db", `{"stack":"prod","tier_of":"gold€"}`},
		"have that of reserved keys, cut to the length":  {Options{UserMetadata: "metadata/tags/tag", Reserved: Reserved{Namespaces: []string{"metering."}, Keys: []string{"cost"}, Length: 4}}, "", "", "billing / db", `{"cost":"7","stack":"prod","tier_of":"gold"}`},
		"have no user metadata where none is reserved":   {Options{UserMetadata: "metadata/tags/tag"}, "", "", "billing / db", "null"},
		"have elements with one key as the last of them": {Options{UserMetadata: "metadata/owner/user", Reserved: Reserved{Keys: []string{"user"}, Length: 9}}, "", "", "billing / db", `{"user":"alice"}`},
	} {
		t.Run(name, func(t *testing.T) {
			d, err := parse([]byte(ownedXML), golibvirt.DomainPaused, &tc.opts)
			if err != nil {
				t.Fatal(err)
			}
			var m struct {
				Display string         `json:"display_name"`
				User    map[string]any `json:"user_metadata"`
			}
			if err := json.Unmarshal(d.Metadata, &m); err != nil {
				t.Fatal(err)
			}
			user, _ := json.Marshal(m.User)
			if diff := cmp.Diff([]string{tc.project, tc.user, tc.display, tc.display, tc.metadata}, []string{d.Project, d.User, d.Display, m.Display, string(user)}); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if d.State != 3 || d.VCPUs != 1 || d.Memory != 1<<20 || !d.Perf || d.Flavor != nil {
				t.Errorf("definition %+v", d)
			}
		})
	}
}

func TestNovasOwnerHoldsOverPaths(t *testing.T) {
	text := strings.Replace(ownedXML, "<metadata>", `<metadata><i:instance xmlns:i="http://openstack.org/xmlns/libvirt/nova/1.0"><i:name>web</i:name>
		<i:flavor name="m1"/><i:owner><i:user uuid="u"/><i:project uuid="p"/></i:owner></i:instance>`, 1)
	d, err := parse([]byte(text), golibvirt.DomainRunning, &Options{OwnerProject: "title", OwnerUser: "title", FlavorIDs: map[string]string{"m1": "id-1"}})
	if err != nil {
		t.Fatal(err)
	}
	if d.Project != "p" || d.User != "u" || d.Display != "web" || !strings.Contains(string(d.Metadata), `"flavor":{"id":"id-1"`) {
		t.Errorf("definition %+v, metadata %s", d, d.Metadata)
	}
}

func TestTheNewerOfNovasVersionsHolds(t *testing.T) {
	const text = `<domain><name>a</name><uuid>c0ffee00-1111-4222-8333-444455556666</uuid><metadata>
		<a:instance xmlns:a="http://example.org/other"><a:name>other</a:name></a:instance>
		<b:instance xmlns:b="http://openstack.org/xmlns/libvirt/nova/1.1"><b:name>new</b:name></b:instance>
		<c:instance xmlns:c="http://openstack.org/xmlns/libvirt/nova/1.0"><c:name>old</c:name></c:instance></metadata></domain>`
	d, err := parse([]byte(text), golibvirt.DomainRunning, &Options{})
	if err != nil || d.Display != "new" {
		t.Errorf("got %+v, %v", d, err)
	}
}

func TestPathsThatAreNone(t *testing.T) {
	for _, good := range []Path{"title", "metadata/owner/@project", "a/b/c"} {
		if err := good.Check(); err != nil {
			t.Error(err)
		}
	}
	for _, bad := range []Path{"/title", "a//b", "a/", "@project", "a/@b/c", "a/@", "//*", "a[1]", "name()"} {
		if bad.Check() == nil {
			t.Errorf("%q is a path", bad)
		}
	}
}
