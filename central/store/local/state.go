package local

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/cockroachdb/pebble/v2"
	"go.uber.org/zap"
)

// loadState reads the state record and returns the newest batch that is
// flushed. A folder without one is a new store.
func (s *Store) loadState() (flushed uint64, err error) {
	v, closer, err := s.db.Get(stateKey())
	if errors.Is(err, pebble.ErrNotFound) {
		b := s.db.NewBatch()
		if err := b.Set(stateKey(), s.stateValue(0), nil); err != nil {
			return 0, err
		}
		return 0, s.commit(b)
	}
	if err != nil {
		return 0, fmt.Errorf("read state: %w", err)
	}
	defer closer.Close()
	return s.readState(v)
}

func (s *Store) stateValue(flushed uint64) []byte {
	v := binary.AppendUvarint([]byte{formatVersion}, flushed)
	return binary.AppendUvarint(v, uint64(s.generation))
}

func (s *Store) readState(v []byte) (flushed uint64, err error) {
	r := reader{src: v}
	switch version := r.byte(); {
	case version > formatVersion:
		return 0, newerFormat(int(version), formatVersion)
	case version < formatVersion && r.err == nil:
		return 0, fmt.Errorf("it is of format %d, from before the first release; this program knows %d: choose another folder", version, formatVersion)
	}
	flushed = r.uvarint()
	s.generation = r.number()
	return flushed, r.done("state")
}

// load reads the sets of sequence numbers, what is known of the resources, and
// which hours there are.
func (s *Store) load() error {
	err := s.scan([]byte{keySeqs}, []byte{keySeqs + 1}, func(k, v []byte) error {
		if len(k) < 9 {
			return errCorrupt
		}
		set, err := decodeSeqSet(v)
		s.epochs[epoch{string(k[9:]), binary.BigEndian.Uint64(k[1:])}] = set
		return err
	})
	if err != nil {
		return fmt.Errorf("read sequence numbers: %w", err)
	}
	err = s.scan([]byte{keyResource}, []byte{keyResource + 1}, func(k, v []byte) error {
		if len(k) != 5 {
			return errCorrupt
		}
		no := binary.BigEndian.Uint32(k[1:])
		if int(no) >= len(s.catalogue.resources) {
			return fmt.Errorf("resource %d is not in the catalogue", no)
		}
		err := s.catalogue.readResource(s.catalogue.resources[no], v)
		if err != nil && s.options.lenient {
			r := s.catalogue.resources[no]
			r.meters, r.foreign = nil, false
			s.log.Error("what is known of a resource cannot be read", zap.String("resource", r.id), zap.Error(err))
			return nil
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("read resources: %w", err)
	}
	err = s.scan([]byte{keyMetered}, []byte{keyMetered + 1}, func(k, v []byte) error {
		r := reader{src: v}
		if len(k) != 5 || int(binary.BigEndian.Uint32(k[1:])) >= len(s.catalogue.nodes) {
			return errCorrupt
		}
		s.catalogue.metered[binary.BigEndian.Uint32(k[1:])] = r.varint()
		return r.done("first sample of a node")
	})
	if err != nil {
		return fmt.Errorf("read nodes: %w", err)
	}
	err = s.scan([]byte{keyMetaUsed}, []byte{keyMetaUsed + 1}, func(k, v []byte) error {
		r := reader{src: v}
		if len(k) != 5 || int(binary.BigEndian.Uint32(k[1:])) >= len(s.catalogue.used) {
			return errCorrupt
		}
		s.catalogue.used[binary.BigEndian.Uint32(k[1:])] = day(r.varint())
		return r.done("day of metadata")
	})
	if err != nil {
		return fmt.Errorf("read days of metadata: %w", err)
	}
	if err := s.jump(keyRows, 5, func(k []byte) { s.hours = append(s.hours, readHour(k)) }); err != nil {
		return fmt.Errorf("find hours: %w", err)
	}
	if err := errors.Join(s.loadPending(), s.loadIDs()); err != nil {
		return err
	}
	return s.loadEvents()
}

func (s *Store) scan(from, to []byte, each func(k, v []byte) error) error {
	it, err := s.db.NewIter(&pebble.IterOptions{LowerBound: from, UpperBound: to})
	if err != nil {
		return err
	}
	for ok := it.First(); ok; ok = it.Next() {
		if err := each(it.Key(), it.Value()); err != nil {
			return errors.Join(err, it.Close())
		}
	}
	return it.Close()
}

// jump calls each with the first bytes that follow a kind in its keys: once for
// all keys that share them.
func (s *Store) jump(kind byte, length int, each func(k []byte)) error {
	it, err := s.db.NewIter(&pebble.IterOptions{LowerBound: []byte{kind}, UpperBound: []byte{kind + 1}})
	if err != nil {
		return err
	}
	var next []byte
	for ok := it.First(); ok; ok = it.SeekGE(next) {
		if len(it.Key()) < 1+length {
			err = errCorrupt
			break
		}
		each(it.Key()[1 : 1+length])
		next = append(append(next[:0], it.Key()[:1+length]...), bytes.Repeat([]byte{0xff}, 32)...)
	}
	return errors.Join(err, it.Close())
}

// bornHolders returns the times of the first samples of the holders. The
// caller holds the store's lock.
func (r *resource) bornHolders() []int64 {
	out := make([]int64, len(r.holders))
	for i, h := range r.holders {
		out[i] = h.born
	}
	return out
}

// append writes the record of a resource. Times are relative to last, that of
// its newest sample ever, which most series have.
func (st *state) append(dst []byte, last int64, meters []*meter, born []int64, foreign bool) []byte {
	flag := byte(0)
	if foreign {
		flag = 1
	}
	dst = append(dst, recordVersion, flag)
	newest := func(n *newest) {
		if !n.has {
			dst = append(dst, 0)
			return
		}
		dst = append(dst, 1)
		dst = binary.AppendVarint(dst, last-n.last)
		dst = binary.AppendVarint(dst, n.last-n.first)
		dst = binary.AppendUvarint(dst, uint64(n.holder.pos))
		dst = binary.AppendUvarint(dst, uint64(n.meta))
	}
	dst = binary.AppendVarint(dst, last)
	newest(&st.newest)
	dst = binary.AppendUvarint(dst, uint64(len(meters)))
	for i, m := range meters {
		dst = binary.AppendUvarint(dst, uint64(m.no))
		if i < len(st.series) {
			newest(&st.series[i])
		} else {
			dst = append(dst, 0)
		}
	}
	dst = binary.AppendUvarint(dst, uint64(len(st.holders)))
	for _, h := range st.holders {
		if !h.has {
			dst = append(dst, 0)
			continue
		}
		dst = append(dst, 1)
		dst = binary.AppendVarint(dst, last-h.last)
		dst = binary.AppendVarint(dst, h.last-h.first)
	}
	dst = binary.AppendUvarint(dst, uint64(len(born)))
	for _, at := range born {
		dst = binary.AppendVarint(dst, last-at)
	}
	return dst
}

// readResource reads what state.append wrote.
func (c *catalogue) readResource(res *resource, v []byte) error {
	r := reader{src: v}
	r.version()
	res.foreign = r.byte() == 1
	st := &state{}
	base := r.varint()
	newest := func() (n newest) {
		if n.has = r.byte() == 1; !n.has {
			return n
		}
		n.last = base - r.varint()
		n.first = n.last - r.varint()
		pos, meta := r.uvarint(), r.number()
		if pos >= uint64(len(res.holders)) || int(meta) >= len(c.metas) {
			r.fail()
			return n
		}
		n.holder, n.meta = res.holders[pos], meta
		return n
	}
	st.newest = newest()
	for n := r.length(uint64(len(r.src))); n > 0 && r.err == nil; n-- {
		no := r.number()
		series := newest()
		if int(no) >= len(c.meters) {
			r.fail()
			break
		}
		res.meters = append(res.meters, c.meters[no])
		st.series = append(st.series, series)
	}
	for n := r.length(uint64(len(res.holders))); n > 0 && r.err == nil; n-- {
		var h lifetime
		if h.has = r.byte() == 1; h.has {
			h.last = base - r.varint()
			h.first = h.last - r.varint()
		}
		st.holders = append(st.holders, h)
	}
	for n, i := r.length(uint64(len(res.holders))), 0; i < n; i++ {
		res.holders[i].born = base - r.varint()
	}
	if err := r.done("resource"); err != nil {
		return err
	}
	res.flushed = st
	res.last = max(res.last, base)
	return nil
}
