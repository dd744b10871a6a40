package local

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"math"
	"slices"

	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/sample"
)

// fineLength is the length of the shorter rollups; the longer ones are of an hour.
const fineLength = int64(5 * 60 * 1e6)

// fewSamples is how many samples in 5 minutes, on average, are shorter one by
// one than as a run.
const fewSamples = 8

// rollup is what is kept of a series' hour: as few runs as there can be, and
// runs that end with every fifth minute. Where there are few samples it is only
// the latter, of one sample each.
type rollup struct {
	coarse, fine []run
}

// roller makes rollups of points.
type roller struct {
	rollup
	open [2][]openRun // of the chains: the run that may go on
}

type openRun struct {
	chain *holder // one of the chain's holders
	at    int     // position in the list of runs
}

// roll makes the rollups of a series' points of an hour, which are in the order
// of time and then that of storing.
func (r *roller) roll(points []point, kind sample.Kind, holders []*holder) {
	r.coarse, r.fine = r.coarse[:0], r.fine[:0]
	r.open[0], r.open[1] = r.open[0][:0], r.open[1][:0]
	buckets := 0
	bucket := int64(math.MinInt64)
	for i := range points {
		if b := floorDiv(points[i].time, fineLength); b != bucket {
			bucket = b
			buckets++
		}
	}
	few := len(points) <= fewSamples*buckets
	bucket = math.MinInt64
	for i := range points {
		p := &points[i]
		if few {
			r.fine = append(r.fine, runOf(p))
			continue
		}
		h := holders[p.holder]
		r.coarse = r.add(r.coarse, &r.open[0], p, h, kind)
		if b := floorDiv(p.time, fineLength); b != bucket {
			bucket = b
			r.open[1] = r.open[1][:0]
		}
		r.fine = r.add(r.fine, &r.open[1], p, h, kind)
	}
}

func (r *roller) add(runs []run, open *[]openRun, p *point, h *holder, kind sample.Kind) []run {
	for i := range *open {
		o := &(*open)[i]
		if o.chain != h && (o.chain.source != h.source || o.chain.incarnation != h.incarnation) {
			continue
		}
		if last := &runs[o.at]; last.continues(p) {
			last.add(p, kind, h.incarnation != 0)
			return runs
		}
		o.at = len(runs)
		return append(runs, runOf(p))
	}
	*open = append(*open, openRun{h, len(runs)})
	return append(runs, runOf(p))
}

func floorDiv(a, b int64) int64 {
	q := a / b
	if a%b < 0 {
		q--
	}
	return q
}

// Flags of a list of runs.
const (
	runsSingle    = 1 << iota // each is of one sample
	runsSteady                // first and last are the smallest and the largest
	runsSquares               // has squares
	runsDirect                // steps are the difference of last and first
	runsMixed                 // volumes of several tags; else the tag follows
	runsTag                   // two bits
	maxRuns       = 1 << 14   // of an hour with more there are no rollups
	rollupVersion = 1
)

// rollupNone is the record of an hour that has no rollups.
var rollupNone = []byte{rollupVersion}

func isNone(record []byte) bool { return len(record) == 1 && record[0] == rollupVersion }

// append appends the record of a series' hour.
func (r *rollup) append(dst []byte, h hour, kind sample.Kind) []byte {
	dst = append(dst, rollupVersion)
	var coarse []byte
	if len(r.coarse) > 0 {
		coarse = appendRuns(nil, r.coarse, h, kind, true)
	}
	dst = append(binary.AppendUvarint(dst, uint64(len(coarse))), coarse...)
	return appendRuns(dst, r.fine, h, kind, kind != sample.Cumulative)
}

func appendRuns(dst []byte, runs []run, h hour, kind sample.Kind, squares bool) []byte {
	flags := byte(runsSingle | runsSteady | runsDirect)
	if squares {
		flags |= runsSquares
	}
	tag := runs[0].firstVolume.Tag
	for i := range runs {
		r := &runs[i]
		if r.count > 1 {
			flags &^= runsSingle
		}
		if r.minVolume != r.firstVolume || r.maxVolume != r.lastVolume {
			flags &^= runsSteady
		}
		for _, v := range [...]sample.Volume{r.firstVolume, r.lastVolume, r.minVolume, r.maxVolume} {
			if v.Tag != tag {
				flags |= runsMixed
			}
		}
		direct := exact(r.lastVolume)
		direct.Sub(exact(r.firstVolume))
		if kind == sample.Cumulative && !direct.Equal(r.steps) {
			flags &^= runsDirect
		}
	}
	if flags&runsMixed == 0 {
		flags |= byte(tag) * runsTag
	}
	dst = binary.AppendUvarint(append(dst, flags), uint64(len(runs)))
	var buf [64]uint64
	list := buf[:0]
	vector := func(of func(r *run) uint64) {
		list = list[:0]
		for i := range runs {
			list = append(list, of(&runs[i]))
		}
		dst = appendVector(dst, list)
	}
	volumes := func(of func(r *run) sample.Volume) {
		if flags&runsMixed != 0 {
			for i := range runs {
				dst = append(dst, byte(of(&runs[i]).Tag))
			}
		}
		list = list[:0]
		for i := range runs {
			list = append(list, of(&runs[i]).Bits)
		}
		if flags&runsMixed == 0 && tag == sample.F64 {
			dst = appendFloats(dst, list)
		} else {
			dst = appendVector(dst, list)
		}
	}
	base := uint64(int64(h) * hourLength)
	vector(func(r *run) uint64 { return uint64(r.first) - base })
	vector(func(r *run) uint64 { return uint64(r.holder) })
	vector(func(r *run) uint64 { return uint64(r.meta) })
	vector(func(r *run) uint64 { return uint64(r.origin) })
	vector(func(r *run) uint64 { return uint64(r.node) })
	volumes(func(r *run) sample.Volume { return r.firstVolume })
	if flags&runsSingle != 0 {
		return dst
	}
	vector(func(r *run) uint64 { return uint64(r.count) })
	vector(func(r *run) uint64 { return uint64(r.last - r.first) })
	volumes(func(r *run) sample.Volume { return r.lastVolume })
	if flags&runsSteady == 0 {
		volumes(func(r *run) sample.Volume { return r.minVolume })
		volumes(func(r *run) sample.Volume { return r.maxVolume })
	}
	dst = appendSums(dst, runs, func(r *run) store.Exact { return r.sum })
	if squares {
		vector(func(r *run) uint64 { return math.Float64bits(r.squares) })
	}
	switch kind {
	case sample.Cumulative:
		if flags&runsDirect == 0 {
			dst = appendSums(dst, runs, func(r *run) store.Exact { return r.steps })
		}
	case sample.Gauge:
		dst = appendSums(dst, runs, func(r *run) store.Exact { return r.area })
	}
	return dst
}

// How sums are stored: one by one, or as a vector where they are integers of
// 64 bits.
const (
	sumsExact = iota
	sumsInt
)

func appendSums(dst []byte, runs []run, of func(r *run) store.Exact) []byte {
	var buf [64]uint64
	list := buf[:0]
	for i := range runs {
		v, ok := of(&runs[i]).Int64()
		if !ok {
			dst = append(dst, sumsExact)
			for i := range runs {
				dst = of(&runs[i]).Append(dst)
			}
			return dst
		}
		list = append(list, uint64(v))
	}
	return appendVector(append(dst, sumsInt), list)
}

// decodeCoarse reads the long runs of a record, decodeFine the short ones.
func (r *rollup) decodeCoarse(src []byte, h hour, kind sample.Kind) error {
	in, length, err := rollupHead(src)
	if err != nil {
		return err
	}
	if r.coarse = r.coarse[:0]; length == 0 {
		return nil
	}
	part := reader{src: in.src[:length]}
	r.coarse = part.runs(r.coarse, h, kind)
	return part.done("rollup")
}

func (r *rollup) decodeFine(src []byte, h hour, kind sample.Kind) error {
	in, length, err := rollupHead(src)
	if err != nil {
		return err
	}
	in.src = in.src[length:]
	r.fine = in.runs(r.fine[:0], h, kind)
	return in.done("rollup")
}

func rollupHead(src []byte) (in reader, length uint64, err error) {
	in = reader{src: src}
	if v := in.byte(); in.err == nil && v != rollupVersion {
		return in, 0, fmt.Errorf("decode rollup: %w: format %d is unknown", errCorrupt, v)
	}
	length = in.uvarint()
	if in.err != nil || length > uint64(len(in.src)) {
		return in, 0, fmt.Errorf("decode rollup: %w", errCorrupt)
	}
	return in, length, nil
}

// runs reads a list of runs.
func (r *reader) runs(out []run, h hour, kind sample.Kind) []run {
	flags := r.byte()
	n := r.length(maxRuns)
	if r.err != nil || n == 0 {
		r.fail()
		return out
	}
	start := len(out)
	out = append(out, make([]run, n)...)
	runs := out[start:]
	var list []uint64
	vector := func(set func(to *run, v uint64)) {
		list = r.vector(list[:0], n)
		for i := range min(n, len(list)) {
			set(&runs[i], list[i])
		}
	}
	number := func(set func(to *run, v uint32)) {
		vector(func(to *run, v uint64) {
			if v > math.MaxUint32 {
				r.fail()
			}
			set(to, uint32(v))
		})
	}
	tag := sample.Tag(flags / runsTag & 3)
	volumes := func(set func(to *run, v sample.Volume)) {
		var tags []byte
		if flags&runsMixed != 0 {
			tags = r.bytes(uint64(n))
		}
		if flags&runsMixed == 0 && tag == sample.F64 {
			list = r.floats(list[:0], n)
		} else {
			list = r.vector(list[:0], n)
		}
		for i := range min(n, len(list)) {
			v := sample.Volume{Bits: list[i], Tag: tag}
			if tags != nil {
				v.Tag = sample.Tag(tags[i])
			}
			if v.Tag > sample.F64 || v.Tag == sample.F64 && !finite(v.Float64()) {
				r.fail()
				return
			}
			set(&runs[i], v)
		}
	}
	base := uint64(int64(h) * hourLength)
	vector(func(to *run, v uint64) { to.first = int64(base + v) })
	number(func(to *run, v uint32) { to.holder = v })
	number(func(to *run, v uint32) { to.meta = v })
	number(func(to *run, v uint32) { to.origin = v })
	number(func(to *run, v uint32) { to.node = v })
	volumes(func(to *run, v sample.Volume) { to.firstVolume = v })
	if flags&runsSingle != 0 {
		for i := range runs {
			to := &runs[i]
			to.last, to.count, to.lastVolume, to.minVolume, to.maxVolume = to.first, 1, to.firstVolume, to.firstVolume, to.firstVolume
			to.sum.AddVolume(to.firstVolume)
			to.mean = to.firstVolume.Float64()
		}
		return out
	}
	vector(func(to *run, v uint64) { to.count = int64(v) })
	vector(func(to *run, v uint64) { to.last = to.first + int64(v) })
	volumes(func(to *run, v sample.Volume) { to.lastVolume = v })
	if flags&runsSteady == 0 {
		volumes(func(to *run, v sample.Volume) { to.minVolume = v })
		volumes(func(to *run, v sample.Volume) { to.maxVolume = v })
	} else {
		for i := range runs {
			runs[i].minVolume, runs[i].maxVolume = runs[i].firstVolume, runs[i].lastVolume
		}
	}
	r.sums(runs, func(to *run) *store.Exact { return &to.sum })
	for i := range runs {
		if runs[i].count < 1 {
			r.fail()
			return out
		}
		runs[i].mean = runs[i].sum.Float64() / float64(runs[i].count)
		runs[i].squares = math.NaN()
	}
	if flags&runsSquares != 0 {
		vector(func(to *run, v uint64) { to.squares = math.Float64frombits(v) })
	}
	switch kind {
	case sample.Cumulative:
		if flags&runsDirect == 0 {
			r.sums(runs, func(to *run) *store.Exact { return &to.steps })
			break
		}
		for i := range runs {
			runs[i].steps.AddVolume(runs[i].lastVolume)
			runs[i].steps.Sub(exact(runs[i].firstVolume))
		}
	case sample.Gauge:
		r.sums(runs, func(to *run) *store.Exact { return &to.area })
	}
	return out
}

func finite(f float64) bool { return !math.IsNaN(f) && !math.IsInf(f, 0) }

func (r *reader) sums(runs []run, of func(to *run) *store.Exact) {
	switch r.byte() {
	case sumsExact:
		for i := range runs {
			e, rest, err := store.ReadExact(r.src)
			if err != nil {
				r.fail()
				return
			}
			*of(&runs[i]), r.src = e, rest
		}
	case sumsInt:
		list := r.vector(nil, len(runs))
		for i := range min(len(list), len(runs)) {
			*of(&runs[i]) = store.ExactInt(int64(list[i]))
		}
	default:
		r.fail()
	}
}

// check returns an error for runs that name what the catalogue lacks.
func (v *view) checkRuns(runs []run) error {
	for i := range runs {
		r := &runs[i]
		if int(r.holder) >= len(v.holders) || int(r.meta) >= len(v.metas) || int(r.origin) >= len(v.origins) || int(r.node) >= len(v.nodes) {
			return fmt.Errorf("read rollup: %w: it names what the catalogue lacks", errCorrupt)
		}
	}
	return nil
}

// byTime puts points into the order of time, then that of storing.
func byTime(points []point) {
	order := func(a, b point) int {
		return cmp.Or(cmp.Compare(a.time, b.time), cmp.Compare(a.seq, b.seq), cmp.Compare(a.index, b.index))
	}
	if !slices.IsSortedFunc(points, order) {
		slices.SortFunc(points, order)
	}
}
