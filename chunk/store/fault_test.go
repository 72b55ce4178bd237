package store

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/cairnstore/cairn/chunk/disk"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// ioSites lists the places of this package that do I/O which can fail: where
// an operation is given its Done, where a call waits for the disk, and where
// Pages are called. It reads the source, so that a new place is not forgotten.
func ioSites(t *testing.T) []string {
	t.Helper()
	names, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	fset := token.NewFileSet()
	for _, name := range names {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		src, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		f, err := parser.ParseFile(fset, name, src, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range f.Decls {
			fn, ok := d.(*ast.FuncDecl)
			if !ok {
				continue
			}
			ast.Inspect(fn, func(n ast.Node) bool {
				switch n := n.(type) {
				case *ast.KeyValueExpr:
					if k, ok := n.Key.(*ast.Ident); ok && k.Name == "Done" {
						out = append(out, doneSite(fn, n.Value))
					}
				case *ast.AssignStmt:
					if s, ok := n.Lhs[0].(*ast.SelectorExpr); ok && s.Sel.Name == "Done" {
						out = append(out, doneSite(fn, n.Rhs[0]))
					}
				case *ast.CallExpr:
					if site := callSite(fset, n); site != "" {
						out = append(out, site)
					}
				}
				return true
			})
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

func doneSite(fn *ast.FuncDecl, v ast.Expr) string {
	if s, ok := v.(*ast.SelectorExpr); ok {
		return s.Sel.Name
	}
	return fn.Name.Name
}

// callSite names a call that waits for the disk, or one of Pages.
func callSite(fset *token.FileSet, call *ast.CallExpr) string {
	sel, ok := call.Fun.(*ast.SelectorExpr)
	if !ok {
		return ""
	}
	p := fset.Position(call.Pos())
	at := fmt.Sprintf("%s:%d", filepath.Base(p.Filename), p.Line)
	switch x := sel.X.(type) {
	case *ast.Ident:
		if x.Name == "disk" && slices.Contains([]string{"ReadAt", "WriteAt", "SyncAll", "AllocateAt"}, sel.Sel.Name) {
			return at
		}
	case *ast.SelectorExpr:
		if strings.EqualFold(x.Sel.Name, "pages") && sel.Sel.Name != "Keep" {
			return at
		}
	}
	return ""
}

var closure = regexp.MustCompile(`(\.func\d+|-fm)+(\.\d+)*$`)

// siteOf names the place an operation came from, as ioSites does.
func siteOf(op *disk.Op) string {
	if op != nil {
		name := closure.ReplaceAllString(runtime.FuncForPC(reflect.ValueOf(op.Done).Pointer()).Name(), "")
		if i := strings.LastIndex(name, "chunk/store."); i >= 0 {
			return name[strings.LastIndex(name, ".")+1:]
		}
	}
	pcs := make([]uintptr, 30)
	frames := runtime.CallersFrames(pcs[:runtime.Callers(2, pcs)])
	for {
		f, more := frames.Next()
		if strings.Contains(f.Function, "chunk/store.") && !strings.HasSuffix(f.File, "_test.go") {
			return fmt.Sprintf("%s:%d", filepath.Base(f.File), f.Line)
		}
		if !more {
			return "?"
		}
	}
}

// tracer is a disk, with Pages, that knows where its calls come from, and
// fails one of them.
type tracer struct {
	*disk.Mem
	pages   *memPages
	n       int      // calls so far
	sites   []string // of each call
	fail    int      // this one fails; 0: none
	failed  string   // where it came from
	kind    disk.Kind
	off     int64    // a read that failed there fails there again
	also    []string // and came from here
	ofPages bool     // the failed one was the pages'
	after   int      // writes and syncs submitted since
	hidden  bool     // reads have to be submitted
	grown   bool     // all of the disk is there
}

func (d *tracer) Size() int64 {
	if d.grown {
		return d.Mem.Size()
	}
	return testSize
}

func (d *tracer) count(op *disk.Op) bool {
	d.n++
	if d.fail == 0 {
		d.sites = append(d.sites, siteOf(op))
	}
	if d.failed != "" && op != nil && (op.Kind == disk.Write || op.Kind == disk.Sync) {
		d.after++
	}
	if d.n != d.fail {
		return false
	}
	d.failed = siteOf(op)
	return true
}

func (d *tracer) Submit(op *disk.Op) {
	again := d.kind == disk.Read && d.failed != "" && op.Kind == disk.Read && d.off >= op.Off && d.off < op.Off+int64(len(op.Bufs[0]))
	if again {
		d.also = append(d.also, siteOf(op))
	}
	if d.count(op) || again {
		d.kind, d.off = op.Kind, op.Off
		op.Done(status.Errorf(status.IO, "made to fail: %w", syscall.EIO))
		return
	}
	d.Mem.Submit(op)
}

func (d *tracer) ReadNow(b []byte, off int64) bool { return !d.hidden && d.Mem.ReadNow(b, off) }

// tracedPages are the tracer's pages.
type tracedPages struct{ d *tracer }

func (p tracedPages) call() error {
	if p.d.count(nil) {
		p.d.ofPages = true
		return syscall.EIO
	}
	return nil
}

func (p tracedPages) Save(at uint64, batch []SavedPage, done func(error)) {
	if err := p.call(); err != nil {
		done(err)
		return
	}
	p.d.pages.Save(at, batch, done)
}

func (p tracedPages) Get(key []byte) ([]byte, error) {
	if err := p.call(); err != nil {
		return nil, err
	}
	return p.d.pages.Get(key)
}

func (p tracedPages) Load(at uint64, f func(p SavedPage, newer bool) error) (uint64, error) {
	if err := p.call(); err != nil {
		return 0, err
	}
	return p.d.pages.Load(at, f)
}

func (p tracedPages) Keep(at uint64) { p.d.pages.Keep(at) }

func (p tracedPages) Wipe() error {
	if err := p.call(); err != nil {
		return err
	}
	return p.d.pages.Wipe()
}

// wholeLife formats, opens, plays, kills, opens again, plays and closes over d;
// it returns what may be found on the disk, and the error of a step that is not
// a request.
func wholeLife(t *testing.T, d *tracer, seed uint64) (p *player, models []model, err error) {
	p = newPlayer(t, seed, nil)
	models = []model{{}}
	if err := Make(d, Format{ID: testID, Incarnation: 1, SegmentBytes: testSeg}); err != nil {
		return p, models, err
	}
	for life := range 2 {
		s, err := Open(Config{Disk: d, BootID: testBoot, Pages: tracedPages{d}, IndexBytes: 3 * pageBytes, CheckpointBytes: 1 << 20})
		if err != nil {
			return p, models, err
		}
		if p.s = s; life > 0 && d.failed != "" {
			return p, models, nil
		}
		models = p.cutRun(150)
		if d.failed != "" {
			return p, models, nil
		}
		d.hidden = !d.hidden
	}
	for b := ids.Block(0); b < 6*pageBlocks; b += 64 { // of another chunk, to be dropped
		q := put(9, b, 64, ids.MakeVersion(p.epoch, 1), 1)
		if q.Epoch = p.epoch; ask(p.s, q).Status != status.OK {
			return p, models, nil
		}
	}
	merged := put(1, 0, 20, ids.MakeVersion(p.epoch, 1), 1) // of another volume, in a layer to be merged
	merged.Volume = 2
	for i := range merged.Sums {
		merged.Sums[i] = wire.BlockSum(2, 1, 0, ids.Block(i), merged.Version, merged.Data[i*blockBytes:(i+1)*blockBytes])
	}
	layers := layersOf(1, [2]ids.LayerID{0, 1}, [2]ids.LayerID{1})
	layers.Volume = 2
	for _, q := range []wire.Request{merged, layers, {Kind: wire.Merge, Volume: 2, Chunk: 1}, {Kind: wire.Flush, Volume: 1}, {Kind: wire.Drop, Volume: 1, Chunk: 9}} {
		if q.Epoch = p.epoch; ask(p.s, q).Status != status.OK {
			return p, models, nil
		}
	}
	d.Mem.Flip(100, 1) // one copy of the superblock: a scrub writes it anew
	if err := p.s.StartScrub(0, 1<<30); err != nil {
		t.Fatal(err)
	}
	steps(p.s, 30)
	if err := p.s.Close(); err != nil {
		return p, []model{p.m}, err
	}
	d.grown = true
	if seed == 1 {
		d.Mem.Flip(blockBytes+100, 1)
	}
	_, _, err = Grow(d)
	return p, []model{p.m}, err
}

// Every place that does I/O has had it failed, several times each. A write, a
// sync, an allocation or a discard that fails stops the store for good: nothing
// more is written or synced, nothing more is answered OK. Whatever failed, what
// was flushed is found again.
func TestEveryIOHasFailed(t *testing.T) {
	failed := map[string]int{}
	for seed := range uint64(2) {
		plan := &tracer{Mem: disk.NewMem(testSize + 2*testSeg), pages: newMemPages()}
		if _, _, err := wholeLife(t, plan, seed); err != nil {
			t.Fatal(err)
		}
		for _, n := range chosen(plan.sites) {
			d := &tracer{Mem: disk.NewMem(testSize + 2*testSeg), pages: newMemPages(), fail: n}
			p, models, err := wholeLife(t, d, seed)
			if d.failed == "" {
				t.Fatalf("seed %d: call %d of %d was not made again", seed, n, plan.n)
			}
			failed[d.failed]++
			for _, s := range d.also {
				failed[s]++
			}
			afterFailure(t, d, p, models, err)
		}
	}
	for n := 1; n < 4; n++ { // an inspection says what it could not read
		d := &tracer{Mem: formatMem(t), pages: newMemPages(), fail: n}
		if rep, err := Inspect(d, nil); err == nil && len(rep.Damage) == 0 {
			t.Fatalf("call %d of an inspection (%s) failed and nobody was told", n, d.failed)
		}
		failed[d.failed]++
	}
	all := ioSites(t)
	var missing []string
	for _, s := range all {
		if failed[s] == 0 {
			missing = append(missing, s)
		}
		t.Logf("%-16s failed %d times", s, failed[s])
	}
	t.Logf("I/O calls of the store: %d of %d have failed", len(all)-len(missing), len(all))
	if len(missing) > 0 {
		t.Fatalf("never failed: %v: let wholeLife come by there", missing)
	}
}

// chosen picks some calls of every place: the first ones, the last, some between.
func chosen(sites []string) []int {
	by := map[string][]int{}
	for i, s := range sites {
		by[s] = append(by[s], i+1)
	}
	var out []int
	for _, ns := range by {
		for _, i := range []int{0, 1, len(ns) / 3, len(ns) / 2, len(ns) * 3 / 4, len(ns) - 1} {
			if i < len(ns) {
				out = append(out, ns[i])
			}
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// afterFailure holds the store to having stopped, and what is on the disk to
// what it may be.
func afterFailure(t *testing.T, d *tracer, p *player, models []model, err error) {
	t.Helper()
	what := fmt.Sprintf("seed %d, call %d (%s) failed", p.seed, d.fail, d.failed)
	stops := !d.ofPages && d.kind != disk.Read
	onTheWay := 0
	if d.kind == disk.Allocate || d.kind == disk.Discard || d.failed == "rewroteSuper" {
		onTheWay = 1 // they are submitted along with others
	}
	if stops && d.after > onTheWay {
		t.Fatalf("%s: %d writes and syncs followed", what, d.after)
	}
	if s := p.s; s != nil && stops && err == nil {
		if r := ask(s, wire.Request{Kind: wire.Flush, Volume: 1, Epoch: p.epoch}); r.Status == status.OK {
			t.Fatalf("%s: a flush is answered OK", what)
		}
		if !strings.HasPrefix(s.Usage().State, "failed") {
			t.Fatalf("%s: the store is %q", what, s.Usage().State)
		}
		if s.Close() == nil {
			t.Fatalf("%s: it closes as if nothing were wrong", what)
		}
	}
	for _, keep := range []int{0, 100} {
		c := d.Mem.Crash(uint64(d.fail), keep)
		s, err := Open(Config{Disk: c, BootID: "boot-2"})
		if status.Of(err) == status.NotFound && p.s == nil {
			if err := Make(c, Format{ID: testID, Incarnation: 1, SegmentBytes: testSeg}); err != nil {
				t.Fatalf("%s: it cannot be formatted again: %v", what, err)
			}
			continue
		}
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		q := *p
		if q.s = s; s.Incarnation() > 1 { // an opening could not read something, and said so
			readsRightOrSays(t, &q, s, what)
			continue
		}
		q.recovered(models, what)
	}
}
