package local

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/cockroachdb/pebble/v2"
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
	if version := r.byte(); version > formatVersion {
		return 0, newerFormat(int(version), formatVersion)
	}
	flushed = r.uvarint()
	s.generation = r.number()
	return flushed, r.done("state")
}

// load reads the sets of sequence numbers, what is known of the resources, and
// which days there are.
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
		return s.catalogue.readResource(s.catalogue.resources[no], v)
	})
	if err != nil {
		return fmt.Errorf("read resources: %w", err)
	}
	s.days, err = s.findDays()
	return err
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

// findDays jumps from day to day.
func (s *Store) findDays() ([]day, error) {
	it, err := s.db.NewIter(&pebble.IterOptions{LowerBound: []byte{keyRows}, UpperBound: []byte{keyRows + 1}})
	if err != nil {
		return nil, fmt.Errorf("find days: %w", err)
	}
	defer it.Close()
	var days []day
	for ok := it.First(); ok; {
		if len(it.Key()) < 5 {
			return nil, fmt.Errorf("find days: %w", errCorrupt)
		}
		d := readDay(it.Key()[1:])
		days = append(days, d)
		next := bytes.Repeat([]byte{0xff}, 16)
		ok = it.SeekGE(append(appendDay([]byte{keyRows}, d), next...))
	}
	return days, it.Error()
}

// append writes the record of a resource. Times are relative to its newest
// sample, which most series have.
func (st *state) append(dst []byte, meters []*meter, foreign bool) []byte {
	flag := byte(0)
	if foreign {
		flag = 1
	}
	dst = append(dst, recordVersion, flag)
	newest := func(n *newest) {
		dst = binary.AppendVarint(dst, st.newest.last-n.last)
		dst = binary.AppendVarint(dst, n.last-n.first)
		dst = binary.AppendUvarint(dst, uint64(n.holder.pos))
		dst = binary.AppendUvarint(dst, uint64(n.meta))
	}
	dst = binary.AppendVarint(dst, st.newest.last)
	newest(&st.newest)
	count := 0
	for i := range st.series {
		if st.series[i].has {
			count++
		}
	}
	dst = binary.AppendUvarint(dst, uint64(count))
	for i := range st.series {
		if st.series[i].has {
			dst = binary.AppendUvarint(dst, uint64(meters[i].no))
			newest(&st.series[i])
		}
	}
	dst = binary.AppendUvarint(dst, uint64(len(st.holders)))
	for _, h := range st.holders {
		if !h.has {
			dst = append(dst, 0)
			continue
		}
		dst = append(dst, 1)
		dst = binary.AppendVarint(dst, st.newest.last-h.last)
		dst = binary.AppendVarint(dst, h.last-h.first)
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
		n.has = true
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
	if err := r.done("resource"); err != nil {
		return err
	}
	res.flushed = st
	res.last = max(res.last, st.newest.last)
	return nil
}
