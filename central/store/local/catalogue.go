package local

import (
	"crypto/sha256"
	"database/sql"
	"errors"
	"fmt"
	"hash/maphash"
	"math"
	"net/url"
	"slices"
	"strings"
	"sync"

	"modernc.org/sqlite" // and its driver of that name
	sqlite3 "modernc.org/sqlite/lib"

	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/sample"
)

// catalogueVersion is the format of the SQLite file, in its user_version.
const catalogueVersion = 1

// The catalogue numbers what samples have in common, from 0. A number is in
// the file before any record of the store names it; one that nothing names
// does no harm. Everything is in memory as well.
const catalogueSchema = `
CREATE TABLE meter (no INTEGER PRIMARY KEY, name TEXT NOT NULL, kind TEXT NOT NULL, unit TEXT NOT NULL);
CREATE TABLE node (no INTEGER PRIMARY KEY, name TEXT NOT NULL);
CREATE TABLE origin (no INTEGER PRIMARY KEY, name TEXT NOT NULL);
CREATE TABLE resource (no INTEGER PRIMARY KEY, id TEXT NOT NULL);
CREATE TABLE holder (
	no INTEGER PRIMARY KEY, resource INTEGER NOT NULL REFERENCES resource, source TEXT NOT NULL,
	project TEXT NOT NULL, user TEXT NOT NULL, incarnation INTEGER NOT NULL);
CREATE TABLE metadata (no INTEGER PRIMARY KEY, data BLOB NOT NULL);
CREATE TABLE gap (
	seq INTEGER NOT NULL, n INTEGER NOT NULL, node TEXT NOT NULL, meter TEXT NOT NULL, resource TEXT NOT NULL,
	"from" INTEGER NOT NULL, "to" INTEGER NOT NULL, reason TEXT NOT NULL, PRIMARY KEY (seq, n)) WITHOUT ROWID;
CREATE INDEX gap_to ON gap ("to");
CREATE UNIQUE INDEX gap_once ON gap (node, meter, resource, "from", "to", reason);
PRAGMA user_version = 1;
`

// meter is a meter with its number.
type meter struct {
	no   uint32
	hash uint64 // random; the sum of them tells sets of meters apart
	sample.MeterRef
}

// holder is what held a resource's counters: an owner and an incarnation. A
// series is a meter of a holder.
type holder struct {
	no          uint32
	pos         int // in the resource's holders
	resource    *resource
	source      string
	project     string
	user        string
	incarnation sample.Incarnation
	born        int64 // time of the oldest sample it ever had
}

func (h *holder) is(r *sample.Row) bool {
	return h.incarnation == r.Incarnation && h.source == r.Source && h.project == r.Project && h.user == r.User
}

// resource is a resource with what is known of its samples. Lists only grow.
type resource struct {
	no      uint32
	id      string
	holders []*holder
	meters  []*meter
	layouts []uint64 // sums of the hashes of the meters that its rows had
	foreign bool     // has samples with foreign ids
	last    int64    // time of its newest sample in the head or flushed

	// The committer's memory of the row before.
	holder *holder
	meta   uint32

	flushed *state // never nil; replaced, not changed
}

// state is what is known of a resource's flushed samples that have not
// expired.
type state struct {
	newest  newest
	series  []newest   // by position in resource.meters
	holders []lifetime // by position in resource.holders
}

// newest is the newest sample of something, and the time of the oldest.
type newest struct {
	has         bool
	first, last int64
	holder      *holder
	meta        uint32
}

// lifetime is the time from the oldest to the newest sample.
type lifetime struct {
	has         bool
	first, last int64
}

func (l *lifetime) add(t int64) {
	if !l.has {
		*l = lifetime{true, t, t}
	}
	l.first, l.last = min(l.first, t), max(l.last, t)
}

// add takes a sample that was stored after all that were added before.
func (n *newest) add(t int64, h *holder, meta uint32) {
	if !n.has {
		*n = newest{true, t, t, h, meta}
	}
	n.first = min(n.first, t)
	if t >= n.last {
		n.last, n.holder, n.meta = t, h, meta
	}
}

// catalogue holds the dimensions. Only the committer adds to it, under the
// store's lock; it may read without.
type catalogue struct {
	db   *sql.DB
	save sync.Mutex // held while the file is written

	seed      maphash.Seed
	meters    []*meter
	nodes     []string
	metered   []int64 // by node: time of the oldest sample it ever sent
	origins   []sample.Origin
	resources []*resource
	holders   []*holder
	metas     [][]byte // 0 is empty, others are if they are collected
	used      []day    // by metadata: of the newest sample that had it

	byMeter    map[sample.MeterRef]*meter
	byNode     map[string]uint32
	byOrigin   map[sample.Origin]uint32
	byResource map[string]*resource
	byMeta     map[[16]byte]uint32

	saved saved
}

// saved counts what the file has of each list.
type saved struct{ meters, nodes, origins, resources, holders, metas int }

// openCatalogue opens or makes the file and reads all of it.
func openCatalogue(path string) (*catalogue, error) {
	dsn := "file:" + (&url.URL{Path: path}).EscapedPath() + "?_pragma=journal_mode(WAL)&_pragma=synchronous(FULL)&_pragma=busy_timeout(10000)"
	db, err := sql.Open("sqlite", dsn)
	if err != nil {
		return nil, fmt.Errorf("open catalogue %s: %w", path, err)
	}
	db.SetMaxOpenConns(4)
	c := &catalogue{
		db: db, seed: maphash.MakeSeed(), metas: [][]byte{nil}, used: []day{math.MinInt32}, byMeter: map[sample.MeterRef]*meter{}, byNode: map[string]uint32{},
		byOrigin: map[sample.Origin]uint32{}, byResource: map[string]*resource{}, byMeta: map[[16]byte]uint32{},
	}
	if err := c.load(); err != nil {
		return nil, errors.Join(fmt.Errorf("open catalogue %s: %w", path, err), db.Close())
	}
	return c, nil
}

// close closes the file, after what is being written: a flush of a store that
// failed may still be at it.
func (c *catalogue) close() error {
	c.save.Lock()
	defer c.save.Unlock()
	return c.db.Close()
}

func (c *catalogue) load() error {
	var version int
	if err := c.db.QueryRow("PRAGMA user_version").Scan(&version); err != nil {
		return err
	}
	switch {
	case version == 0:
		tx, err := c.db.Begin()
		if err != nil {
			return err
		}
		if _, err := tx.Exec(catalogueSchema); err != nil {
			return errors.Join(err, tx.Rollback())
		}
		if err := tx.Commit(); err != nil {
			return err
		}
	case version > catalogueVersion:
		return newerFormat(version, catalogueVersion)
	}
	var name, kind, unit, user string
	var no, resource int
	var incarnation int64
	var data []byte
	for _, table := range []struct {
		query string
		dest  []any
		add   func()
		len   func() int
	}{
		{
			"SELECT no, name, kind, unit FROM meter ORDER BY no",
			[]any{&no, &name, &kind, &unit},
			func() { c.addMeter(sample.MeterRef{Name: name, Kind: sample.Kind(kind), Unit: unit}) }, func() int { return len(c.meters) },
		},
		{"SELECT no, name FROM node ORDER BY no", []any{&no, &name}, func() { c.addNode(name) }, func() int { return len(c.nodes) }},
		{"SELECT no, name FROM origin ORDER BY no", []any{&no, &name}, func() { c.addOrigin(sample.Origin(name)) }, func() int { return len(c.origins) }},
		{"SELECT no, id FROM resource ORDER BY no", []any{&no, &name}, func() { c.addResource(name) }, func() int { return len(c.resources) }},
		{"SELECT no, data FROM metadata ORDER BY no", []any{&no, &data}, func() { c.addMeta(slices.Clone(data)) }, func() int { return len(c.metas) }},
		{
			"SELECT no, resource, source, project, user, incarnation FROM holder ORDER BY no",
			[]any{&no, &resource, &name, &kind, &user, &incarnation},
			func() {
				if resource >= 0 && resource < len(c.resources) {
					c.addHolder(c.resources[resource], &sample.Row{Source: name, Project: kind, User: user, Incarnation: sample.Incarnation(incarnation)})
				}
			}, func() int { return len(c.holders) },
		},
	} {
		if err := c.scan(table.query, table.dest, func() error {
			if no != table.len() {
				return fmt.Errorf("number %d where %d is expected", no, table.len())
			}
			table.add()
			if table.len() != no+1 {
				return fmt.Errorf("number %d cannot be read", no)
			}
			return nil
		}); err != nil {
			return fmt.Errorf("%s: %w", table.query, err)
		}
	}
	c.saved = c.counts()
	return nil
}

func (c *catalogue) scan(query string, dest []any, row func() error, args ...any) error {
	rows, err := c.db.Query(query, args...)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		if err := rows.Scan(dest...); err != nil {
			return err
		}
		if err := row(); err != nil {
			return err
		}
	}
	return rows.Err()
}

func (c *catalogue) counts() saved {
	return saved{len(c.meters), len(c.nodes), len(c.origins), len(c.resources), len(c.holders), len(c.metas)}
}

func (c *catalogue) addMeter(ref sample.MeterRef) *meter {
	ref = sample.MeterRef{Name: strings.Clone(ref.Name), Kind: sample.Kind(strings.Clone(string(ref.Kind))), Unit: strings.Clone(ref.Unit)}
	m := &meter{no: uint32(len(c.meters)), MeterRef: ref, hash: maphash.Comparable(c.seed, ref)}
	c.meters = append(c.meters, m)
	c.byMeter[ref] = m
	return m
}

func (c *catalogue) addNode(name string) uint32 {
	name = strings.Clone(name)
	no := uint32(len(c.nodes))
	c.nodes = append(c.nodes, name)
	c.metered = append(c.metered, math.MaxInt64)
	c.byNode[name] = no
	return no
}

func (c *catalogue) addOrigin(name sample.Origin) uint32 {
	name = sample.Origin(strings.Clone(string(name)))
	no := uint32(len(c.origins))
	c.origins = append(c.origins, name)
	c.byOrigin[name] = no
	return no
}

func (c *catalogue) addResource(id string) *resource {
	r := &resource{no: uint32(len(c.resources)), id: strings.Clone(id), last: math.MinInt64, flushed: &state{}}
	c.resources = append(c.resources, r)
	c.byResource[r.id] = r
	return r
}

func (c *catalogue) addHolder(r *resource, row *sample.Row) *holder {
	h := &holder{
		no: uint32(len(c.holders)), pos: len(r.holders), resource: r, source: strings.Clone(row.Source),
		project: strings.Clone(row.Project), user: strings.Clone(row.User), incarnation: row.Incarnation, born: math.MaxInt64,
	}
	c.holders = append(c.holders, h)
	r.holders = append(r.holders, h)
	return h
}

func metaKey(data []byte) [16]byte {
	sum := sha256.Sum256(data)
	return [16]byte(sum[:16])
}

// addMeta takes ownership of data.
func (c *catalogue) addMeta(data []byte) uint32 {
	no := uint32(len(c.metas))
	c.metas, c.used = append(c.metas, data), append(c.used, math.MinInt32)
	c.byMeta[metaKey(data)] = no
	return no
}

// dimensions are the lists of the catalogue as they were at one time.
type dimensions struct {
	meters    []*meter
	nodes     []string
	origins   []sample.Origin
	resources []*resource
	holders   []*holder
	metas     [][]byte
}

// dimensions must be called under the store's lock.
func (c *catalogue) dimensions() dimensions {
	return dimensions{c.meters, c.nodes, c.origins, c.resources, c.holders, c.metas}
}

// write brings the file up to d and adds the gaps, in one synced transaction.
func (c *catalogue) write(d dimensions, gaps []gap) error {
	c.save.Lock()
	defer c.save.Unlock()
	err := c.transaction(d, gaps)
	var code *sqlite.Error
	if errors.As(err, &code) && code.Code()&0xff == sqlite3.SQLITE_FULL {
		return fmt.Errorf("write catalogue: %w: %w", store.ErrDiskFull, err)
	}
	if err != nil {
		return fmt.Errorf("write catalogue: %w", err)
	}
	return nil
}

func (c *catalogue) transaction(d dimensions, gaps []gap) error {
	to := saved{len(d.meters), len(d.nodes), len(d.origins), len(d.resources), len(d.holders), len(d.metas)}
	if to == c.saved && len(gaps) == 0 {
		return nil
	}
	tx, err := c.db.Begin()
	if err != nil {
		return err
	}
	insert := func(statement string, from, to int, args func(i int) []any) {
		if err != nil || from >= to {
			return
		}
		st, e := tx.Prepare(statement)
		if e != nil {
			err = e
			return
		}
		for i := from; i < to && err == nil; i++ {
			_, err = st.Exec(args(i)...)
		}
		err = errors.Join(err, st.Close())
	}
	insert("INSERT INTO meter VALUES (?, ?, ?, ?)", c.saved.meters, to.meters, func(i int) []any {
		return []any{i, d.meters[i].Name, string(d.meters[i].Kind), d.meters[i].Unit}
	})
	insert("INSERT INTO node VALUES (?, ?)", c.saved.nodes, to.nodes, func(i int) []any { return []any{i, d.nodes[i]} })
	insert("INSERT INTO origin VALUES (?, ?)", c.saved.origins, to.origins, func(i int) []any { return []any{i, string(d.origins[i])} })
	insert("INSERT INTO resource VALUES (?, ?)", c.saved.resources, to.resources, func(i int) []any { return []any{i, d.resources[i].id} })
	insert("INSERT INTO holder VALUES (?, ?, ?, ?, ?, ?)", c.saved.holders, to.holders, func(i int) []any {
		h := d.holders[i]
		return []any{i, h.resource.no, h.source, h.project, h.user, int64(h.incarnation)}
	})
	insert("INSERT INTO metadata VALUES (?, ?)", c.saved.metas, to.metas, func(i int) []any { return []any{i, d.metas[i]} })
	insert("INSERT OR IGNORE INTO gap VALUES (?, ?, ?, ?, ?, ?, ?, ?)", 0, len(gaps), func(i int) []any {
		g := &gaps[i]
		return []any{int64(g.seq), g.n, g.Node, g.Meter, g.Resource, g.From, g.To, g.Reason}
	})
	if err != nil {
		return errors.Join(err, tx.Rollback())
	}
	if err := tx.Commit(); err != nil {
		return err
	}
	c.saved = to
	return nil
}

// gap is a gap with its place in the order of all.
type gap struct {
	seq uint64
	n   int
	sample.Gap
}

// gaps reads those that overlap the time.
func (c *catalogue) gaps(from, to int64) ([]gap, error) {
	var out []gap
	var g gap
	var seq int64
	err := c.scan(`SELECT seq, n, node, meter, resource, "from", "to", reason FROM gap WHERE "to" >= ? AND "from" <= ?`,
		[]any{&seq, &g.n, &g.Node, &g.Meter, &g.Resource, &g.From, &g.To, &g.Reason}, func() error {
			g.seq = uint64(seq)
			out = append(out, g)
			return nil
		}, from, to)
	if err != nil {
		return nil, fmt.Errorf("read gaps: %w", err)
	}
	return out, nil
}

// collect forgets metadata, whose numbers stay, and the gaps that ended before a time.
func (c *catalogue) collect(metas []uint32, gapsBefore int64) error {
	c.save.Lock()
	defer c.save.Unlock()
	tx, err := c.db.Begin()
	if err != nil {
		return err
	}
	for _, no := range metas {
		if _, err := tx.Exec("UPDATE metadata SET data = x'' WHERE no = ?", no); err != nil {
			return errors.Join(err, tx.Rollback())
		}
	}
	if _, err := tx.Exec(`DELETE FROM gap WHERE "to" < ?`, gapsBefore); err != nil {
		return errors.Join(err, tx.Rollback())
	}
	return tx.Commit()
}
