// Package identity remembers, beside a store, how far it had come, so that an
// older copy of the store put in its place is recognised.
//
// Duty: the record of one store in the host's own directory, and the verdict on
// a store that was just opened. Floor: F3. It does not change the store: what
// may be an older copy is given another incarnation by its caller.
package identity

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/cairnstore/cairn/chunk/store"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// Seen is what was last seen of a store.
type Seen struct {
	Store       ids.StoreID
	Incarnation ids.Incarnation
	Boot        string // of the system, ≤ 64 bytes
	store.Position
}

// The record: two slots of 4 KiB that are written in turn, so that one of them
// is whole whenever the power goes.
//
//	 0       8     16      32            40     44        52       60       68      …    4092
//	+-------+-----+-------+-------------+------+---------+--------+-----------+------+---+-----+
//	| magic | seq | store | incarnation | life | durable | written|boot length| boot | 0 | crc |
//	+-------+-----+-------+-------------+------+---------+--------+-----------+------+---+-----+
const (
	magic     = "CAIRNSE1"
	slotBytes = 4096
	maxBoot   = 64
)

var le = binary.LittleEndian

// Record is one store's record, open for writing.
type Record struct {
	f    *os.File
	seq  uint64
	seen Seen
	had  bool
}

// Open opens the record at path, made if it is missing.
func Open(path string) (*Record, error) {
	_, serr := os.Stat(path)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open the record of a store: %w", err)
	}
	r := &Record{f: f}
	if errors.Is(serr, os.ErrNotExist) {
		if err := syncDir(filepath.Dir(path)); err != nil {
			return nil, errors.Join(fmt.Errorf("make the record of a store: %w", err), f.Close())
		}
	}
	b := make([]byte, 2*slotBytes)
	if n, err := f.ReadAt(b, 0); err != nil && n < len(b) && !errors.Is(err, io.EOF) {
		return nil, errors.Join(fmt.Errorf("read the record of a store: %w", err), f.Close())
	}
	for i := range 2 {
		if seq, seen, ok := decode(b[i*slotBytes : (i+1)*slotBytes]); ok && seq > r.seq {
			r.seq, r.seen, r.had = seq, seen, true
		}
	}
	return r, nil
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// Judge says why a store that was just opened may be an older copy of itself;
// "": it is the one that was seen, with everything that was seen of it. first
// is whether the cluster has never heard of the store.
func (r *Record) Judge(now Seen, first bool) string {
	switch s := r.seen; {
	case first:
		return ""
	case !r.had || s.Store != now.Store:
		return "this host has not seen it before"
	case now.Incarnation < s.Incarnation:
		return fmt.Sprintf("it is incarnation %d and was %d", now.Incarnation, s.Incarnation)
	case now.Life <= s.Life:
		return fmt.Sprintf("this is its opening %d and %d was seen", now.Life, s.Life)
	case now.Recovered < s.Durable:
		return fmt.Sprintf("its log ends at %d and was durable up to %d", now.Recovered, s.Durable)
	case now.Boot == s.Boot && now.Recovered < s.Written:
		return fmt.Sprintf("its log ends at %d and was written up to %d, and the system has not stopped since", now.Recovered, s.Written)
	}
	return ""
}

// Save records what is seen now. durable makes it survive a power loss; without
// that an older record may be found then, which demands less.
func (r *Record) Save(s Seen, durable bool) error {
	if len(s.Boot) > maxBoot {
		return status.Errorf(status.Invalid, "a boot id of %d bytes: at most %d are possible", len(s.Boot), maxBoot)
	}
	if r.had && r.seen == s && !durable {
		return nil
	}
	r.seq++
	if _, err := r.f.WriteAt(encode(r.seq, s), int64(r.seq%2)*slotBytes); err != nil {
		return fmt.Errorf("write the record of store %s: %w", s.Store.Short(), err)
	}
	if durable {
		if err := r.f.Sync(); err != nil {
			return fmt.Errorf("sync the record of store %s: %w", s.Store.Short(), err)
		}
	}
	r.seen, r.had = s, true
	return nil
}

// Close closes the record.
func (r *Record) Close() error { return r.f.Close() }

func encode(seq uint64, s Seen) []byte {
	b := make([]byte, 0, slotBytes)
	b = append(b, magic...)
	b = le.AppendUint64(b, seq)
	b = append(b, s.Store[:]...)
	b = le.AppendUint64(b, uint64(s.Incarnation))
	b = le.AppendUint32(b, s.Life)
	b = le.AppendUint64(b, s.Durable)
	b = le.AppendUint64(b, s.Written)
	b = le.AppendUint32(b, uint32(len(s.Boot)))
	b = append(b, s.Boot...)
	b = b[:slotBytes]
	le.PutUint32(b[slotBytes-4:], wire.Checksum(b[:slotBytes-4]))
	return b
}

func decode(b []byte) (seq uint64, s Seen, ok bool) {
	if len(b) != slotBytes || string(b[:8]) != magic || le.Uint32(b[slotBytes-4:]) != wire.Checksum(b[:slotBytes-4]) {
		return 0, s, false
	}
	n := le.Uint32(b[60:])
	if n > maxBoot {
		return 0, s, false
	}
	copy(s.Store[:], b[16:32])
	s.Incarnation, s.Life = ids.Incarnation(le.Uint64(b[32:])), le.Uint32(b[40:])
	s.Durable, s.Written = le.Uint64(b[44:]), le.Uint64(b[52:])
	s.Boot = string(b[64 : 64+n])
	return le.Uint64(b[8:]), s, true
}
