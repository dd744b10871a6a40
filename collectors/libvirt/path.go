package libvirt

import (
	"encoding/xml"
	"fmt"
	"strings"
	"unicode/utf8"
)

// Path names elements or an attribute of a domain's XML: names from below the
// element domain on, with / between them, and at the end perhaps @ and the name of
// an attribute. Namespaces don't matter. Examples: title,
// metadata/owner/project/@uuid.
type Path string

// Check returns what is wrong with the path.
func (p Path) Check() error {
	names, _ := p.split()
	for _, name := range names {
		if name == "" || strings.ContainsAny(name, "@*[]() ") {
			return fmt.Errorf("%q is no path such as title or metadata/owner/@project: names with / between them, and @ before an attribute at the end", string(p))
		}
	}
	return nil
}

func (p Path) split() (names []string, attr string) {
	names = strings.Split(string(p), "/")
	if last := names[len(names)-1]; len(last) > 1 && last[0] == '@' && len(names) > 1 {
		return names[:len(names)-1], last[1:]
	}
	return names, ""
}

// node is an element of any XML.
type node struct {
	XMLName xml.Name
	Attrs   []xml.Attr `xml:",any,attr"`
	Text    string     `xml:",chardata"`
	Nodes   []node     `xml:",any"`
}

// attr returns the attribute of that name, or nothing.
func (n *node) attr(name string) string {
	for _, a := range n.Attrs {
		if a.Name.Local == name {
			return a.Value
		}
	}
	return ""
}

// find calls each with the elements below n that the names lead to.
func (n *node) find(names []string, each func(*node)) {
	for i := range n.Nodes {
		switch c := &n.Nodes[i]; {
		case c.XMLName.Local != names[0]:
		case len(names) == 1:
			each(c)
		default:
			c.find(names[1:], each)
		}
	}
}

// text returns what the path leads to first and is not empty, without the blanks
// around it.
func (p Path) text(domain *node) (text string) {
	if p == "" {
		return ""
	}
	names, attr := p.split()
	domain.find(names, func(n *node) {
		found := n.Text
		if attr != "" {
			found = n.attr(attr)
		}
		if text == "" {
			text = strings.TrimSpace(found)
		}
	})
	return text
}

// Reserved says which user metadata is kept: what begins with one of the
// namespaces, which is cut off, and what is one of the keys. Texts are cut to
// Length characters.
type Reserved struct {
	Namespaces, Keys []string
	Length           int
}

// keep returns the user metadata that is kept, by the key that it has then; nil:
// none.
func (r *Reserved) keep(key, value string, kept map[string]string) map[string]string {
	name, ok := key, false
	for _, prefix := range r.Namespaces {
		if prefix != "" && strings.HasPrefix(key, prefix) {
			name, ok = key[len(prefix):], true
			break
		}
	}
	for _, k := range r.Keys {
		ok = ok || k == key
	}
	if !ok {
		return kept
	}
	if utf8.RuneCountInString(value) > r.Length {
		value = string([]rune(value)[:r.Length])
	}
	if kept == nil {
		kept = map[string]string{}
	}
	kept[strings.ReplaceAll(name, ".", "_")] = value
	return kept
}

// userMetadata returns what is kept of the elements that the path leads to: each
// has a key, in its attribute key or name or else as its own name, and a value, in
// its attribute value or as its text.
func (o *Options) userMetadata(domain *node) (kept map[string]string) {
	if o.UserMetadata == "" {
		return nil
	}
	names, _ := o.UserMetadata.split()
	domain.find(names, func(n *node) {
		key, value := n.attr("key"), n.attr("value")
		if key == "" {
			key = n.attr("name")
		}
		if key == "" {
			key = n.XMLName.Local
		}
		if value == "" {
			value = strings.TrimSpace(n.Text)
		}
		kept = o.Reserved.keep(key, value, kept)
	})
	return kept
}
