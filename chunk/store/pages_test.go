package store

import (
	"bytes"
	"errors"
	"hash/fnv"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
)

// memPages is the crashable twin of Pages in memory: what was saved survives;
// a batch that was under way survives in part; and if it is a liar, saved keys
// are lost and bits flip, as databases have been seen to do.
type memPages struct {
	mu     sync.Mutex
	keys   map[string][]pageVersion // by version
	saves  int
	gets   int
	loads  int
	wipes  int
	fails  bool            // Save answers with an error, half done
	hang   bool            // Save is not answered until complete
	flying func(err error) // the batch that hangs
	sent   map[string]pageVersion
	at     uint64
	hook   func() // called while a batch is under way
}

type pageVersion struct {
	at   uint64
	page []byte
}

var errNoPages = errors.New("the pages' disk is full")

func newMemPages() *memPages { return &memPages{keys: map[string][]pageVersion{}} }

func (m *memPages) Save(at uint64, batch []SavedPage, done func(error)) {
	m.mu.Lock()
	m.saves++
	if at <= m.at {
		panic("a version was used twice")
	}
	m.at = at
	if m.hang {
		if m.flying != nil {
			panic("two batches in flight")
		}
		m.sent, m.flying = map[string]pageVersion{}, done
		for _, p := range batch {
			m.sent[string(p.Key)] = pageVersion{at, bytes.Clone(p.Page)}
		}
		m.mu.Unlock()
		return
	}
	if m.hook != nil {
		m.sent = map[string]pageVersion{}
		for _, p := range batch {
			m.sent[string(p.Key)] = pageVersion{at, p.Page}
		}
		m.mu.Unlock()
		m.hook()
		m.mu.Lock()
		m.sent = nil
	}
	for i, p := range batch {
		if m.fails && i%2 == 0 {
			continue
		}
		m.put(string(p.Key), pageVersion{at, bytes.Clone(p.Page)})
	}
	fails := m.fails
	m.mu.Unlock()
	if fails {
		done(errNoPages)
		return
	}
	done(nil)
}

// complete answers the batch that hangs.
func (m *memPages) complete() bool {
	m.mu.Lock()
	done := m.flying
	m.flying = nil
	for k, v := range m.sent {
		m.put(k, v)
	}
	m.sent = nil
	m.mu.Unlock()
	if done != nil {
		done(nil)
	}
	return done != nil
}

func (m *memPages) put(k string, v pageVersion) { m.keys[k] = append(m.keys[k], v) }

func (m *memPages) Get(key []byte) ([]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.gets++
	vs := m.keys[string(key)]
	if len(vs) == 0 || vs[len(vs)-1].page == nil {
		return nil, errors.New("no such page")
	}
	return vs[len(vs)-1].page, nil
}

func (m *memPages) Load(at uint64, f func(p SavedPage, newer bool) error) (top uint64, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.loads++
	for _, k := range slices.Sorted(maps.Keys(m.keys)) {
		vs := m.keys[k]
		newer := vs[len(vs)-1].at > at
		top = max(top, vs[len(vs)-1].at)
		var page []byte
		for _, v := range vs {
			if v.at <= at {
				page = v.page
			}
		}
		if page == nil && !newer {
			continue
		}
		if err := f(SavedPage{[]byte(k), page}, newer); err != nil {
			return 0, err
		}
	}
	m.at = top
	return top, nil
}

func (m *memPages) Keep(at uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for k, vs := range m.keys {
		first := 0
		for i, v := range vs {
			if v.at <= at {
				first = i
			}
		}
		if vs = vs[first:]; len(vs) == 1 && vs[0].page == nil && vs[0].at <= at {
			delete(m.keys, k)
		} else {
			m.keys[k] = vs
		}
	}
}

func (m *memPages) Wipe() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.wipes++
	m.keys, m.at = map[string][]pageVersion{}, 0
	return nil
}

// crash is what is found after a power loss: all that was saved, and of the
// batch under way what chance has kept. A liar loses one of liarKeys versions
// and flips bits too. A page is shared, never changed in place.
func (m *memPages) crash(seed uint64, keepPercent int, liar bool) *memPages {
	m.mu.Lock()
	defer m.mu.Unlock()
	c := newMemPages()
	for k, vs := range m.keys {
		c.keys[k] = slices.Clone(vs)
	}
	for k, v := range m.sent {
		if chance(seed, k, v.at, 0)%100 < uint64(keepPercent) {
			c.put(k, v)
		}
	}
	if !liar {
		return c
	}
	for k, vs := range c.keys {
		vs = slices.DeleteFunc(vs, func(v pageVersion) bool { return chance(seed, k, v.at, 1)%liarKeys == 0 })
		for i, v := range vs {
			if h := chance(seed, k, v.at, 2); h%liarKeys == 0 && len(v.page) > 0 {
				vs[i].page = bytes.Clone(v.page)
				vs[i].page[h/liarKeys%uint64(len(v.page))] ^= 1 << (h / liarKeys >> 32 % 8)
			}
		}
		if len(vs) == 0 {
			delete(c.keys, k)
		} else {
			c.keys[k] = vs
		}
	}
	return c
}

const liarKeys = 12

// chance depends on what it is about and not on the order of a map.
func chance(seed uint64, key string, at, n uint64) uint64 {
	h := fnv.New64a()
	h.Write([]byte(key))
	return rand.NewPCG(seed^h.Sum64(), at*8+n).Uint64()
}

// A page comes back as it was, and from nowhere else.
func TestPageEncoding(t *testing.T) {
	c := &chunk{v: &vol{id: 3}, id: 4, layer: 5}
	full := &page{c: c, n: 6, slots: &slots{}, top: 99}
	for i := range uint32(pageBlocks) {
		full.slots.put(i, entry{version: 7, loc: logStart + i, sum: i, kind: kind(i % 4)})
	}
	for _, p := range []*page{full, {c: c, n: 6, top: 9, one: entry{version: 8, loc: 20, kind: kindZero}}, {c: c, n: 6}} {
		key := p.key()
		if k, ok := parseKey(key); !ok || k != (pageKey{3, 4, 5, 6}) {
			t.Fatalf("key %+v %v", k, ok)
		}
		b := p.encode(key)
		if len(b) > SavedPageBytes {
			t.Fatalf("%d bytes", len(b))
		}
		q := &page{c: c, n: 6}
		if err := q.decode(key, b, 1000); err != nil || q.top != p.top || q.one != p.one || (q.slots == nil) != (p.slots == nil) || p.slots != nil && *q.slots != *p.slots {
			t.Fatalf("%+v comes back as %+v, %v", p, q, err)
		}
		other := (&page{c: c, n: 7}).key()
		if q.decode(other, b, 1000) == nil || pageHash(1, key, b) == pageHash(1, other, b) || pageHash(1, key, b) == pageHash(2, key, b) {
			t.Fatal("a page of another place or store passes")
		}
		for i := range b {
			b[i] ^= 4
			if q.decode(key, b, 1000) == nil {
				t.Fatalf("a flipped bit in byte %d of %d passes", i, len(b))
			}
			b[i] ^= 4
		}
	}
	if (&page{}).decode(full.key(), full.encode(full.key()), logStart+100) == nil {
		t.Fatal("a place beyond the disk passes")
	}
}

// FuzzPage: whatever Pages give back, decoding does not panic or pass limits.
func FuzzPage(f *testing.F) {
	c := &chunk{v: &vol{id: 3}, id: 4}
	key := (&page{c: c}).key()
	f.Add((&page{c: c, one: entry{version: 8, loc: 20, kind: kindZero}}).encode(key))
	f.Add((&page{c: c, slots: &slots{}}).encode(key))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < 4 {
			return
		}
		b = le.AppendUint32(b[:len(b)-4:len(b)-4], pageSum(key, b[:len(b)-4])) // the checksum is no obstacle
		p := &page{c: c}
		if p.decode(key, b, 1000) != nil {
			return
		}
		for i := range uint32(pageBlocks) {
			if e := p.at(i); e.loc >= 1000 || e.loc > 0 && e.loc < logStart || e.kind > kindPoison {
				t.Fatalf("entry %d: %+v", i, e)
			}
		}
	})
}
