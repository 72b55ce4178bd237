package bench

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"time"

	"github.com/cairnstore/cairn/chunk/store"
	"github.com/cairnstore/cairn/proto/wire"
)

// bareBytes is the size of the bare disk's file that is written. The one that is
// read is as large as the store.
const bareBytes = 1 << 30

// bare runs fio with O_DIRECT on a file, and gives operations per second.
func (b *storeBench) bare(ctx context.Context, path, rw, block string, depth int, more ...string) (float64, error) {
	engine := "psync"
	if depth > 1 {
		engine = "libaio"
	}
	args := append([]string{"--name=bare", "--filename=" + path, "--ioengine=" + engine, "--direct=1", "--rw=" + rw, "--bs=" + block,
		"--iodepth=" + strconv.Itoa(depth), "--norandommap", "--output-format=json", "--time_based",
		"--runtime=" + strconv.FormatInt(b.cfg.Each.Milliseconds(), 10) + "ms"}, more...)
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, "fio", args...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return 0, fmt.Errorf("fio on the bare disk: %w: %s", err, lastLines(stderr.String()+stdout.String()))
	}
	side, err := parseFio(stdout.Bytes(), job{name: "bare " + rw, rw: rw})
	return side.IOPS, err
}

// bareFile is a file of the same file system, all of it written: what was not
// is read without the disk.
func (b *storeBench) bareFile(size int64) (string, error) {
	path := b.path(fmt.Sprintf("bare-%d", size))
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	f, err := os.Create(path)
	if err != nil {
		return "", err
	}
	m := newMaker(1)
	for range size / int64(len(m.data)) {
		if _, err := f.Write(m.data); err != nil {
			return "", errors.Join(err, f.Close())
		}
	}
	return path, errors.Join(f.Sync(), f.Close())
}

// capacity is how many blocks of data the store takes.
func (o *openStore) capacity() int { return int(o.Usage().CapacityBytes / 4096) }

// fill writes the first blocks of the volume once, in order.
func (o *openStore) fill(ctx context.Context, m *maker) error {
	m.at = 0
	if _, err := o.run(ctx, load{depth: 4, count: m.blocks / bigBlocks, next: m.bigWrite}); err != nil {
		return err
	}
	_, err := o.run(ctx, load{depth: 1, count: 1, next: func(q *wire.Request) { *q = wire.Request{ID: q.ID, Kind: wire.Flush, Volume: volumeID} }})
	return err
}

// writes: unflushed and grouped writes over a store that has gone round once,
// so that its segments are recycled ones.
func (b *storeBench) writes(ctx context.Context) (err error) {
	o, err := b.makeStore("writes", b.cfg.StoreBytes)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, o.remove()) }()
	m := newMaker(o.capacity() / 4)
	if _, err := o.run(ctx, load{depth: 32, count: int(b.cfg.StoreBytes / 4096), next: m.randomWrite}); err != nil {
		return err
	}
	for _, l := range []struct {
		name        string
		load        load
		least, most float64
	}{
		{"4k random write, depth 32", load{depth: 32, next: m.randomWrite}, 100000, 5},
		{"4k random write, depth 1", load{depth: 1, next: m.randomWrite}, 0, 15},
		{"4k write + flush, depth 32", load{depth: 32, flush: true, next: m.randomWrite}, 60000, 0},
	} {
		var runs []loadResult
		for range b.cfg.Rounds {
			l.load.each = b.cfg.Each
			r, err := o.run(ctx, l.load)
			if err != nil {
				return err
			}
			runs = append(runs, r)
		}
		b.rate(l.name, runs, l.least, l.most)
	}
	return nil
}

// flushes: one write and one flush at a time, beside the bare disk.
func (b *storeBench) flushes(ctx context.Context) (err error) {
	path, err := b.bareFile(bareBytes)
	if err != nil {
		return err
	}
	o, err := b.makeStore("flushes", b.cfg.StoreBytes)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, o.remove()) }()
	m := newMaker(o.capacity() / 4)
	if _, err := o.run(ctx, load{depth: 32, count: int(b.cfg.StoreBytes / 4096), next: m.randomWrite}); err != nil {
		return err
	}
	var own, bare, cpu []float64
	for i := range b.cfg.Rounds + 1 {
		r, err := o.run(ctx, load{depth: 1, flush: true, each: b.cfg.Each, next: m.randomWrite})
		if err != nil {
			return err
		}
		if i == 0 {
			continue // the next segment will be one for flushed writes
		}
		d, err := b.bare(ctx, path, "randwrite", "4k", 1, "--fdatasync=1")
		if err != nil {
			return err
		}
		own, bare, cpu = append(own, r.perS()), append(bare, d), append(cpu, r.cpuUs())
	}
	b.against("4k write + flush, depth 1", "/s", own, bare, cpu, 0.8)
	return nil
}

// reads: from the page cache, and from the disk.
func (b *storeBench) reads(ctx context.Context) (err error) {
	o, err := b.makeStore("reads", b.cfg.StoreBytes)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, o.remove()) }()
	path, err := b.bareFile(b.cfg.StoreBytes)
	if err != nil {
		return err
	}
	m := newMaker(o.capacity() / bigBlocks * bigBlocks)
	if err := o.fill(ctx, m); err != nil {
		return err
	}
	warm := newMaker(m.blocks / 8)
	for _, depth := range []int{32, 1} {
		var runs []loadResult
		for range b.cfg.Rounds + 1 { // the first one warms
			r, err := o.run(ctx, load{depth: depth, each: b.cfg.Each, next: warm.randomRead})
			if err != nil {
				return err
			}
			runs = append(runs, r)
		}
		b.rate(fmt.Sprintf("4k random read, warm, depth %d", depth), runs[1:], 0, 3)
	}
	for _, depth := range []int{32, 1} {
		var own, bare, cpu []float64
		for range b.cfg.Rounds {
			if err := o.cool(); err != nil {
				return err
			}
			r, err := o.run(ctx, load{depth: depth, each: b.cfg.Each, next: m.randomRead})
			if err != nil {
				return err
			}
			d, err := b.bare(ctx, path, "randread", "4k", depth)
			if err != nil {
				return err
			}
			own, bare, cpu = append(own, r.perS()), append(bare, d), append(cpu, r.cpuUs())
		}
		b.against(fmt.Sprintf("4k random read, cold, depth %d", depth), "/s", own, bare, cpu, 0.8)
	}
	return nil
}

// missIndexBytes is room for an eighth of the index that misses goes over.
const missIndexBytes = 256 << 10

// misses: what a read costs whose index page is not in memory, over one whose
// page is.
func (b *storeBench) misses(ctx context.Context) (err error) {
	o, err := b.makeStore("misses", b.cfg.StoreBytes)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, o.remove()) }()
	m := newMaker(8 * missIndexBytes / store.SavedPageBytes * 128 / bigBlocks * bigBlocks)
	if m.blocks > o.capacity() {
		return fmt.Errorf("a store of %d MiB is too small to miss its index", b.cfg.StoreBytes>>20)
	}
	if err := o.fill(ctx, m); err != nil {
		return err
	}
	var hits, misses []loadResult
	measure := func(to *[]loadResult) error {
		for range b.cfg.Rounds + 1 {
			r, err := o.run(ctx, load{depth: 1, each: b.cfg.Each, next: m.randomRead})
			if err != nil {
				return err
			}
			*to = append(*to, r)
		}
		*to = (*to)[1:]
		return nil
	}
	if err := measure(&hits); err != nil {
		return err
	}
	if err := o.close(); err != nil {
		return err
	}
	if o, err = runStore(o.path, missIndexBytes); err != nil {
		return err
	}
	if err := measure(&misses); err != nil {
		return err
	}
	perMiss := (medianOf(misses, loadResult.cpuUs) - medianOf(hits, loadResult.cpuUs)) * 8 / 7
	b.add(StoreFigure{Name: fmt.Sprintf("index page fetched, %d of %d KiB in memory", missIndexBytes>>10, 8*missIndexBytes>>10), Value: perMiss, Unit: "µs of CPU", Met: true})
	return nil
}

// sequential: 1 MiB at a time, before and after random overwrites.
func (b *storeBench) sequential(ctx context.Context) (err error) {
	path, err := b.bareFile(bareBytes)
	if err != nil {
		return err
	}
	o, err := b.makeStore("sequential", b.cfg.StoreBytes)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, o.remove()) }()
	m := newMaker(o.capacity() / 3 / bigBlocks * bigBlocks)
	for range 5 { // once round: the segments are recycled ones, as the bare file is written
		if err := o.fill(ctx, m); err != nil {
			return err
		}
	}
	var own, bare, cpu []float64
	for range b.cfg.Rounds {
		start, cpuBefore := time.Now(), ownCPU()
		if err := o.fill(ctx, m); err != nil {
			return err
		}
		own = append(own, float64(m.blocks)/256/time.Since(start).Seconds())
		cpu = append(cpu, float64((ownCPU()-cpuBefore).Microseconds())/float64(m.blocks/bigBlocks))
		d, err := b.bare(ctx, path, "write", "1M", 4, "--end_fsync=1")
		if err != nil {
			return err
		}
		bare = append(bare, d)
	}
	b.against("1 MiB sequential write, flushed", "MiB/s", own, bare, cpu, 0.7)
	read := func() (loadResult, error) {
		if err := o.cool(); err != nil {
			return loadResult{}, err
		}
		m.at = 0
		return o.run(ctx, load{depth: 4, count: m.blocks / bigBlocks, next: m.bigRead})
	}
	before, err := read()
	if err != nil {
		return err
	}
	if _, err := o.run(ctx, load{depth: 32, count: 2 * m.blocks, next: m.randomWrite}); err != nil {
		return err
	}
	if err := o.settle(ctx); err != nil {
		return err
	}
	after, err := read()
	if err != nil {
		return err
	}
	b.against("1 MiB sequential read after random overwrites", "MiB/s", []float64{after.perS()}, []float64{before.perS()}, []float64{after.cpuUs()}, 0.7)
	return nil
}

// settleMaxWait bounds the wait for compaction.
const settleMaxWait = 2 * time.Minute

// settle waits until the store has done what it does by itself.
func (o *openStore) settle(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, settleMaxWait)
	defer cancel()
	for last, calm := o.Usage().CopiedBytes, 0; calm < 20; {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(stepEvery):
		}
		if now := o.Usage().CopiedBytes; now != last {
			last, calm = now, 0
		} else {
			calm++
		}
	}
	return nil
}

// sustained: random overwrites of a full store, many times over.
func (b *storeBench) sustained(ctx context.Context) (err error) {
	o, err := b.makeStore("sustained", b.cfg.StoreBytes)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, o.remove()) }()
	m := newMaker((o.capacity() - bigBlocks) / bigBlocks * bigBlocks)
	empty, err := o.run(ctx, load{depth: 32, count: m.blocks / 4, next: m.randomWrite})
	if err != nil {
		return err
	}
	if err := o.fill(ctx, m); err != nil {
		return err
	}
	before := o.Usage()
	full, err := o.run(ctx, load{depth: 32, count: b.cfg.Overwrites * m.blocks, next: m.randomWrite})
	if err != nil {
		return err
	}
	after := o.Usage()
	amp := float64(after.LogBytes-before.LogBytes) / (float64(full.ops) * 4096)
	b.add(StoreFigure{Name: "write amplification, full store overwritten", Value: amp, Unit: "×", CPUUs: full.cpuUs(), Target: "≤ 2.5", Met: amp <= 2.5})
	b.add(StoreFigure{Name: "its throughput, against an empty store's", Value: full.perS(), Unit: "/s", CPUUs: full.cpuUs(), Bare: empty.perS(), Ratio: full.perS() / empty.perS(),
		Target: "≥ 0.25 of bare", Met: full.perS() >= empty.perS()/4})
	stall := float64(full.longest.Microseconds()) / 1000
	b.add(StoreFigure{Name: "its longest write", Value: stall, Unit: "ms", Target: "≤ 200", Met: stall <= 200})
	return nil
}

// readyLine is what the process that is to be killed prints once it may be.
const readyLine = "filled"

// recovery: a process fills a store, goes on overwriting it, and is killed with
// SIGKILL; then it is opened here.
func (b *storeBench) recovery(ctx context.Context) (err error) {
	path := b.path("recovery")
	defer func() { err = errors.Join(err, os.RemoveAll(path), os.RemoveAll(path+"-pages")) }()
	cmd := exec.CommandContext(ctx, b.cfg.Bin, "bench", "store-victim", path, strconv.FormatInt(b.cfg.KillBytes, 10))
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err == nil && line != readyLine+"\n" {
		err = fmt.Errorf("the process that fills the store says %q", line)
	}
	err = errors.Join(err, cmd.Process.Kill())
	var exit *exec.ExitError
	if werr := cmd.Wait(); werr != nil && !errors.As(werr, &exit) {
		err = errors.Join(err, werr)
	}
	if err != nil {
		return err
	}
	start, cpu := time.Now(), ownCPU()
	o, err := runStore(path, 0)
	if err != nil {
		return err
	}
	took, used := time.Since(start), ownCPU()-cpu
	u := o.Usage()
	if err := o.close(); err != nil {
		return err
	}
	if u.Note != "" {
		return fmt.Errorf("after the kill: %s", u.Note)
	}
	name := fmt.Sprintf("opening %d MiB after kill -9, %d MiB of log behind the checkpoint", u.LiveBytes>>20, u.ReplayedBytes>>20)
	b.add(StoreFigure{Name: name, Value: took.Seconds(), Unit: "s", CPUUs: float64(used.Microseconds()), Target: "< 2", Met: took < 2*time.Second})
	return nil
}

// RunStoreVictim fills a store with size bytes, overwrites part of it, says so
// and goes on until it is killed.
func RunStoreVictim(ctx context.Context, path string, size int64) error {
	b := &storeBench{dir: ""}
	o, err := b.makeStore(path, size/3*4+size/8+(256<<20))
	if err != nil {
		return err
	}
	m := newMaker(int(size / 4096 / bigBlocks * bigBlocks))
	if m.blocks > o.capacity() {
		return errors.Join(fmt.Errorf("the store takes %d blocks, %d are to be written", o.capacity(), m.blocks), o.remove())
	}
	if err := o.fill(ctx, m); err != nil {
		return err
	}
	go o.flushAlways(ctx)
	if _, err := o.run(ctx, load{depth: 32, count: m.blocks / 4, next: m.randomWrite}); err != nil {
		return err
	}
	if _, err := fmt.Println(readyLine); err != nil {
		return err
	}
	_, err = o.run(ctx, load{depth: 32, each: time.Hour, next: m.randomWrite})
	return errors.Join(err, o.close())
}

// flushAlways flushes twice a second, as often as a gateway does by itself.
func (o *openStore) flushAlways(ctx context.Context) {
	for ctx.Err() == nil {
		_, err := o.run(ctx, load{depth: 1, count: 1, next: func(q *wire.Request) { *q = wire.Request{ID: q.ID, Kind: wire.Flush, Volume: volumeID} }})
		if err != nil {
			return // the load says the same
		}
		select {
		case <-ctx.Done():
		case <-time.After(time.Second / 2):
		}
	}
}
