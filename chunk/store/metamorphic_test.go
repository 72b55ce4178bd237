package store

import (
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"github.com/cairnstore/cairn/chunk/disk"
)

// option is one way to set a store up and to drive it.
type option struct {
	name   string
	seg    int64
	index  int64  // bytes of pages in memory; 0: all, and no checkpoints
	ckpt   int64  // a checkpoint after so many bytes of log
	steps  int    // of background work after each request
	reopen int    // opened again after so many requests; 0: never
	rules  string // of the disk
	hidden bool   // reads have to be submitted
	file   string // "", thin, reserved
	way    string // "" as the store chooses, direct, cached
}

// oneWay sends everything through the page cache, or around it.
type oneWay struct {
	disk.Disk
	direct bool
}

func (d oneWay) Submit(op *disk.Op) {
	op.Direct = d.direct
	d.Disk.Submit(op)
}

// One history under many settings gives one answer: what every block holds is
// the model's, whatever the segments' size, the index's memory, checkpoints,
// compaction, scrubs, openings, and the disk below.
func TestOneHistoryOneAnswer(t *testing.T) {
	options := []option{
		{name: "plain", seg: testSeg},
		{name: "large segments", seg: 4 * testSeg, steps: 1},
		{name: "much background work", seg: testSeg, steps: 8},
		{name: "a small index", seg: testSeg, index: 2 * pageBytes, ckpt: 1 << 40, steps: 1},
		{name: "many checkpoints", seg: testSeg, index: 3 * pageBytes, ckpt: 1 << 18, steps: 2, reopen: 37},
		{name: "opened again and again", seg: testSeg, steps: 1, reopen: 11},
		{name: "checkpoints and large segments", seg: 2 * testSeg, index: 64 * pageBytes, ckpt: 1 << 19, steps: 3, reopen: 29},
		{name: "reads from the disk", seg: testSeg, steps: 2, hidden: true},
		{name: "no discards", seg: testSeg, steps: 4, reopen: 50, rules: "discard fails EOPNOTSUPP"},
		{name: "lost discards", seg: testSeg, steps: 4, reopen: 50, rules: "discard lost"},
		{name: "a thin file", seg: testSeg, steps: 2, reopen: 90, file: "thin"},
		{name: "around the page cache", seg: testSeg, steps: 2, reopen: 70, file: "reserved", way: "direct"},
		{name: "around the page cache, thin", seg: 2 * testSeg, index: 3 * pageBytes, ckpt: 1 << 19, steps: 2, reopen: 40, file: "thin", way: "direct"},
		{name: "through the page cache", seg: testSeg, steps: 2, reopen: 70, file: "thin", way: "cached"},
		{name: "a reserved file", seg: testSeg, steps: 2, reopen: 90, file: "reserved"},
	}
	for seed := range uint64(3) {
		for _, o := range options {
			t.Run(fmt.Sprintf("%s, seed %d", o.name, seed), func(t *testing.T) { o.run(t, seed) })
		}
	}
}

func (o *option) disk(t *testing.T) disk.Disk {
	size := logStart*blockBytes + 40*max(o.seg, testSeg)
	if o.file == "" {
		rules, err := disk.ParseRules(o.rules)
		if err != nil {
			t.Fatal(err)
		}
		var d disk.Disk = disk.NewFaulty(disk.NewMem(size), rules, 1)
		if o.hidden {
			d = struct{ disk.Disk }{d}
		}
		return d
	}
	f, err := disk.Create(filepath.Join(t.TempDir(), "store"), size)
	if err != nil {
		t.Fatal(err)
	}
	if o.file == "reserved" {
		if err := f.Reserve(); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	if o.way == "" {
		return f
	}
	if !f.HasDirect() {
		t.Fatal("the file system of the test's directory has no way around the page cache: set TMPDIR")
	}
	return oneWay{f, o.way == "direct"}
}

func (o *option) run(t *testing.T, seed uint64) {
	d := o.disk(t)
	if err := Make(d, Format{ID: testID, Incarnation: 1, SegmentBytes: o.seg}); err != nil {
		t.Fatal(err)
	}
	cfg := Config{Disk: d, BootID: testBoot, IndexBytes: o.index, CheckpointBytes: o.ckpt}
	if o.index > 0 {
		cfg.Pages = newMemPages()
	}
	open := func() *Store {
		t.Helper()
		s, err := Open(cfg)
		if err != nil {
			t.Fatal(err)
		}
		if n := s.Usage().Note; n != "" {
			t.Fatal(n)
		}
		return s
	}
	p := newPlayer(t, seed, open())
	now := time.Duration(0)
	for i := range 300 {
		q, after := p.next()
		mustOK(t, ask(p.s, q))
		p.m = after
		for range o.steps {
			now += 300 * time.Millisecond
			p.s.Step(now)
		}
		if i%100 == 50 && o.steps > 0 {
			if err := p.s.StartScrub(0, 1<<30); err != nil {
				t.Fatal(err)
			}
		}
		if o.reopen > 0 && i%o.reopen == o.reopen-1 {
			if err := p.s.Close(); err != nil {
				t.Fatal(err)
			}
			p.s = open()
		}
	}
	verify(t, p.s, p.m, p.epoch, "the model's answer")
	p.checkQueries()
	if err := p.s.Close(); err != nil {
		t.Fatal(err)
	}
	p.s = open()
	verify(t, p.s, p.m, p.epoch, "the model's answer, opened again")
	if err := p.s.Close(); err != nil {
		t.Fatal(err)
	}
}
