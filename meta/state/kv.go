// Package state is the metadata service's state machine: what every mutation
// does to volumes, chunk maps, hosts, stores, VMs and client sessions.
//
// Duty: Apply, the typed keys under which state is kept, reads over them, and
// two stores of keys (in memory, and an overlay that collects a batch).
// Floor: F2. It has no clock, no socket and no disk: time comes inside the
// command, and keys live wherever the caller's KV keeps them. Leases, liveness
// and placement are not here; the leader decides those (meta/server).
package state

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"maps"
	"slices"
)

// KV is an ordered set of keys with values, seen inside one transaction. It
// has no errors: an implementation over a disk remembers its first error and
// fails the whole transaction at commit.
type KV interface {
	// Get returns the value of key, or nil when there is none. The value must
	// not be changed.
	Get(key []byte) []byte
	// Set gives key a value; neither slice may be changed afterwards.
	Set(key, val []byte)
	// Delete removes key, if it is there.
	Delete(key []byte)
	// Scan calls fn for every key with the prefix that is ≥ from (nil: all), in
	// order, until fn returns false. fn must not write.
	Scan(prefix, from []byte, fn func(key, val []byte) bool)
}

// HashPair is one pair's part of the state hash. The hash of a state is the
// wrapping sum of its pairs' parts, so that order does not matter and a change
// costs one subtraction and one addition.
func HashPair(key, val []byte) uint64 {
	var room [512]byte // most pairs fit: nothing is allocated
	b := binary.BigEndian.AppendUint32(room[:0], uint32(len(key)))
	sum := sha256.Sum256(append(append(b, key...), val...))
	return binary.BigEndian.Uint64(sum[:])
}

// HashAll returns the state hash of kv by scanning it.
func HashAll(kv KV) uint64 {
	var sum uint64
	kv.Scan(nil, nil, func(k, v []byte) bool { sum += HashPair(k, v); return true })
	return sum
}

// Mem is a KV in memory, for simulators and tests. The zero value is not
// usable; call NewMem.
type Mem struct{ m map[string][]byte }

var _ KV = (*Mem)(nil)

// NewMem returns an empty Mem.
func NewMem() *Mem { return &Mem{m: map[string][]byte{}} }

// Clone returns an independent copy: a snapshot. Values are shared, they never
// change.
func (m *Mem) Clone() *Mem { return &Mem{m: maps.Clone(m.m)} }

// Get implements KV.
func (m *Mem) Get(key []byte) []byte { return m.m[string(key)] }

// Set implements KV.
func (m *Mem) Set(key, val []byte) { m.m[string(key)] = val }

// Delete implements KV.
func (m *Mem) Delete(key []byte) { delete(m.m, string(key)) }

// Scan implements KV. It sorts the matching keys: O(all keys).
func (m *Mem) Scan(prefix, from []byte, fn func(key, val []byte) bool) {
	for _, k := range matching(m.m, prefix, from) {
		if !fn([]byte(k), m.m[k]) {
			return
		}
	}
}

func matching(m map[string][]byte, prefix, from []byte) []string {
	var keys []string
	for k := range m {
		if len(k) >= len(prefix) && k[:len(prefix)] == string(prefix) && k >= string(from) {
			keys = append(keys, k)
		}
	}
	slices.Sort(keys)
	return keys
}

// Overlay collects writes above a base that stays as it is, so that a batch of
// commands becomes one transaction. Its size is bounded by the batch.
type Overlay struct {
	base    KV
	changed map[string][]byte // nil value: deleted
	got     map[string][]byte // read of the base by Get; nil value: it has none
}

var _ KV = (*Overlay)(nil)

// NewOverlay returns an overlay without changes.
func NewOverlay(base KV) *Overlay {
	return &Overlay{base: base, changed: map[string][]byte{}, got: map[string][]byte{}}
}

// Get implements KV.
func (o *Overlay) Get(key []byte) []byte {
	if v, ok := o.changed[string(key)]; ok {
		return v
	}
	return o.before(key)
}

// before is the base's value. Most keys are read again: by the next command, or to
// take what they were out of the hash.
func (o *Overlay) before(key []byte) []byte {
	v, ok := o.got[string(key)]
	if !ok {
		v = o.base.Get(key)
		o.got[string(key)] = v
	}
	return v
}

// Set implements KV. An empty value is kept as empty, not as a deletion.
func (o *Overlay) Set(key, val []byte) {
	if val == nil {
		val = []byte{}
	}
	o.changed[string(key)] = val
}

// Delete implements KV.
func (o *Overlay) Delete(key []byte) { o.changed[string(key)] = nil }

// Scan implements KV, merging the base and the changes.
func (o *Overlay) Scan(prefix, from []byte, fn func(key, val []byte) bool) {
	mine := matching(o.changed, prefix, from)
	going := true
	flush := func(limit []byte) { // emit own keys below limit (nil: all)
		for going && len(mine) > 0 && (limit == nil || mine[0] < string(limit)) {
			if v := o.changed[mine[0]]; v != nil {
				going = fn([]byte(mine[0]), v)
			}
			mine = mine[1:]
		}
	}
	o.base.Scan(prefix, from, func(k, v []byte) bool {
		flush(k)
		if !going {
			return false
		}
		if len(mine) > 0 && bytes.Equal([]byte(mine[0]), k) {
			if v = o.changed[mine[0]]; v == nil {
				mine = mine[1:]
				return true
			}
			mine = mine[1:]
		}
		going = fn(k, v)
		return going
	})
	flush(nil)
}

// Changes calls fn for every changed key in order; a nil value is a deletion.
func (o *Overlay) Changes(fn func(key, val []byte) error) error {
	for _, k := range matching(o.changed, nil, nil) {
		if err := fn([]byte(k), o.changed[k]); err != nil {
			return err
		}
	}
	return nil
}

// Sum calls fn for every changed key with its value before and after (nil:
// none), in no order, and returns what the changes add to the base's state hash
// (wrapping).
func (o *Overlay) Sum(fn func(key, old, val []byte)) uint64 {
	var d uint64
	for k, v := range o.changed {
		old := o.before([]byte(k))
		if old != nil {
			d -= HashPair([]byte(k), old)
		}
		if v != nil {
			d += HashPair([]byte(k), v)
		}
		if old != nil || v != nil {
			fn([]byte(k), old, v)
		}
	}
	return d
}

// HashDelta is what the changes add to the base's state hash (wrapping).
func (o *Overlay) HashDelta() uint64 { return o.Sum(func(_, _, _ []byte) {}) }
