package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	metaclient "github.com/cairnstore/cairn/meta/client"
	"github.com/cairnstore/cairn/proto/pb"
)

// The metadata service by itself: three nodes, a process each, with logs on this
// machine's disk, real TCP, and clients that keep many commands in flight.

const (
	metaClients = 16 // each with up to 8 commands in flight
	metaFlights = 8
	allocBatch  = 64 // chunks of one allocation, as a gateway gathers them
	createBatch = 16 // volumes of one command, where it makes many
)

// MetaFigures is what RunMeta measures.
type MetaFigures struct {
	Paced           []MetaPaced  `json:"paced"`
	Creates         []MetaCreate `json:"creations"`
	ChunksPerSecond float64      `json:"chunkAllocationsPerSecond"`
	ChunkCPUUs      float64      `json:"cpuUsPerChunk"`
	FullReadP50Ms   float64      `json:"fullReadP50Ms"` // linearizable, while as much is asked for as can be
	FullReadP99Ms   float64      `json:"fullReadP99Ms"`
	LeaderLossMs    float64      `json:"leaderLossMs"` // from its kill -9 to the next command's answer; heartbeats of 1 s
}

// MetaPaced is a load asked for at the pace of the goals, and linearizable reads,
// 200 a second, beside it.
type MetaPaced struct {
	Batch     int     `json:"volumesPerCommand"`
	Creates   float64 `json:"creationsPerSecond"`
	Chunks    float64 `json:"allocationsPerSecond"`
	ReadP50Ms float64 `json:"readP50Ms"`
	ReadP99Ms float64 `json:"readP99Ms"`
}

// MetaCreate is as many creations as there can be.
type MetaCreate struct {
	Batch     int     `json:"volumesPerCommand"`
	PerSecond float64 `json:"perSecond"`
	CPUUs     float64 `json:"cpuUsPerVolume"` // all three nodes and the clients
}

// metaTrio is three nodes of this machine.
type metaTrio struct {
	peers [3]metaPeer
	nodes [3]*program
}

type metaPeer struct{ id, raft, api string }

// metaConfigText is the file of one node: its name and directory, then every peer.
func (m *metaTrio) config(i int, dir string) string {
	var b strings.Builder
	p := m.peers[i]
	fmt.Fprintf(&b, "id = %q\ncluster = \"bench\"\ndir = %q\nraft = %q\napi = %q\ntimeout_ms = 1000\n", p.id, filepath.Join(dir, p.id), p.raft, p.api)
	for _, p := range m.peers {
		fmt.Fprintf(&b, "[[peer]]\nid = %q\nraft = %q\napi = %q\n", p.id, p.raft, p.api)
	}
	return b.String()
}

func startMetaTrio(ctx context.Context, bin, dir string) (m *metaTrio, err error) {
	m = &metaTrio{}
	for i := range m.peers {
		var addr [2]string
		for k := range addr {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				return m, err
			}
			addr[k] = l.Addr().String()
			if err := l.Close(); err != nil {
				return m, err
			}
		}
		m.peers[i] = metaPeer{fmt.Sprintf("meta-%d", i+1), addr[0], addr[1]}
	}
	for i, p := range m.peers {
		file := filepath.Join(dir, p.id+".toml")
		if err := os.WriteFile(file, []byte(m.config(i, dir)), 0o600); err != nil {
			return m, err
		}
		if m.nodes[i], err = startProgram(ctx, p.id, "tcp", p.api, bin, "meta", "run", "--config", file); err != nil {
			return m, err
		}
	}
	return m, nil
}

func (m *metaTrio) close() (err error) {
	for _, n := range m.nodes {
		if n != nil {
			err = errors.Join(err, n.close())
		}
	}
	return err
}

// cpuTime is the processor time that nodes and clients have used so far.
func (m *metaTrio) cpuTime() (time.Duration, error) {
	pids := []int{os.Getpid()}
	for _, n := range m.nodes {
		pids = append(pids, n.cmd.Process.Pid)
	}
	return cpuOf(pids)
}

func (m *metaTrio) client() *metaclient.Client {
	return metaclient.New(metaclient.Config{Who: "bench", Addrs: m.apis()})
}

func (m *metaTrio) apis() (out []string) {
	for _, p := range m.peers {
		out = append(out, p.api)
	}
	return out
}

// RunMeta measures and prints.
func RunMeta(ctx context.Context, cfg Config) (err error) {
	dir, err := os.MkdirTemp(cfg.Dir, "cairn-bench-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	m, err := startMetaTrio(ctx, cfg.Bin, dir)
	defer func() { err = errors.Join(err, m.close()) }()
	if err != nil {
		return err
	}
	b := &metaBench{m: m, bin: cfg.Bin, each: cfg.Each}
	for range metaClients {
		c := m.client()
		b.clients = append(b.clients, c)
		defer func() { err = errors.Join(err, c.Close()) }()
	}
	f, err := b.run(ctx)
	if err != nil {
		return err
	}
	return printMeta(cfg, f)
}

type metaBench struct {
	m       *metaTrio
	bin     string
	each    time.Duration
	clients []*metaclient.Client
	made    atomic.Int64
	vols    []*pb.Volume // one per worker
	next    []uint32     // the chunk each allocates next
	until   time.Time    // the load's end

	mu    sync.Mutex // guards reads
	reads []time.Duration
}

func (b *metaBench) run(ctx context.Context) (f *MetaFigures, err error) {
	f = &MetaFigures{}
	if err := b.hosts(ctx); err != nil {
		return nil, err
	}
	if err := b.attach(ctx); err != nil {
		return nil, err
	}
	if err := b.upgraded(ctx); err != nil {
		return nil, err
	}
	for _, batch := range []int{createBatch, 1} {
		var creates, chunks atomic.Int64
		_, _, err = b.load(ctx, func(ctx context.Context, c *metaclient.Client, worker int) (int, error) {
			return b.mixed(ctx, c, worker, batch, &creates, &chunks)
		})
		if err != nil {
			return nil, err
		}
		p := MetaPaced{Batch: batch, Creates: float64(creates.Load()) / b.each.Seconds(), Chunks: float64(chunks.Load()) / b.each.Seconds()}
		p.ReadP50Ms, p.ReadP99Ms = b.latencies()
		f.Paced = append(f.Paced, p)
	}
	for _, batch := range []int{createBatch, 1} {
		n, cpu, err := b.load(ctx, b.creator(batch))
		if err != nil {
			return nil, err
		}
		f.Creates = append(f.Creates, MetaCreate{batch, float64(n) / b.each.Seconds(), float64(cpu.Microseconds()) / float64(max(1, n))})
	}
	n, cpu, err := b.load(ctx, b.allocate)
	if err != nil {
		return nil, err
	}
	f.ChunksPerSecond, f.ChunkCPUUs = float64(n)/b.each.Seconds(), float64(cpu.Microseconds())/float64(max(1, n))
	f.FullReadP50Ms, f.FullReadP99Ms = b.latencies()
	f.LeaderLossMs, err = b.leaderLoss(ctx)
	return f, err
}

// creator makes so many volumes more, by one command.
func (b *metaBench) creator(batch int) func(context.Context, *metaclient.Client, int) (int, error) {
	return func(ctx context.Context, c *metaclient.Client, _ int) (int, error) {
		var names []string
		for range batch {
			names = append(names, fmt.Sprintf("v%d", b.made.Add(1)))
		}
		like := &pb.CreateVolume{SizeBytes: 1 << 40}
		cmd := &pb.Command{Op: &pb.Command_CreateVolumes{CreateVolumes: &pb.CreateVolumes{Like: like, Names: names}}}
		if batch == 1 {
			like.Name = names[0]
			cmd.Op = &pb.Command_CreateVolume{CreateVolume: like}
		}
		_, err := c.Do(ctx, cmd)
		return batch, err
	}
}

// upgraded waits until the new cluster uses the newest state version.
func (b *metaBench) upgraded(ctx context.Context) error {
	for {
		nodes, err := b.clients[0].Members(ctx)
		if err != nil {
			return err
		}
		if !slices.ContainsFunc(nodes, func(n *pb.NodeReply) bool { return n.FormatInUse < n.Format }) {
			return nil
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// attach makes a volume for each worker.
func (b *metaBench) attach(ctx context.Context) error {
	b.vols, b.next = make([]*pb.Volume, metaClients*metaFlights), make([]uint32, metaClients*metaFlights)
	for i := range b.vols {
		if _, err := b.creator(1)(ctx, b.clients[i%metaClients], i); err != nil {
			return err
		}
		res, err := b.clients[i%metaClients].Do(ctx, &pb.Command{Op: &pb.Command_Attach{Attach: &pb.Attach{Volume: fmt.Sprintf("v%d", i+1), Host: "host-1", Session: "bench"}}})
		if err != nil {
			return err
		}
		b.vols[i] = res.Volume
	}
	return nil
}

// allocate adds chunks to the worker's volume.
func (b *metaBench) allocate(ctx context.Context, c *metaclient.Client, worker int) (int, error) {
	v, a := b.vols[worker], &pb.Allocate{PreferHost: "host-1"}
	a.VolumeId, a.Epoch, a.Revision = v.Id, v.Epoch, v.Revision
	for range allocBatch {
		a.Indices = append(a.Indices, b.next[worker])
		b.next[worker] = (b.next[worker] + 1) % (1 << 14)
	}
	res, err := c.Do(ctx, &pb.Command{Op: &pb.Command_Allocate{Allocate: a}})
	if err == nil {
		b.vols[worker] = res.Volume
	}
	return allocBatch, err
}

// The load of the goals: each worker takes its turn once in a while, so that
// all together ask for 1,024 creations and 5,120 chunks a second, evenly.
const (
	metaMixedCreates = 1024
	metaMixedAllocs  = 80 // commands
)

// mixed waits for the worker's turn: most make a volume, some allocate.
func (b *metaBench) mixed(ctx context.Context, c *metaclient.Client, worker, batch int, creates, chunks *atomic.Int64) (int, error) {
	const allocators = 16
	rank, of, rate := worker, allocators, metaMixedAllocs
	if worker >= allocators {
		rank, of, rate = worker-allocators, metaClients*metaFlights-allocators, metaMixedCreates/batch
	}
	each := time.Second * time.Duration(of) / time.Duration(rate)
	due := time.NewTimer(each - time.Duration(time.Now().UnixNano()+int64(rank)*int64(each)/int64(of))%each)
	defer due.Stop()
	select {
	case <-due.C:
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	do, done := b.creator(batch), creates
	if worker < allocators {
		do, done = b.allocate, chunks
	}
	n, err := do(ctx, c, worker)
	if time.Now().Before(b.until) {
		done.Add(int64(n))
	}
	return n, err
}

// latencies returns p50 and p99 of the reads since the last call, in ms.
func (b *metaBench) latencies() (p50, p99 float64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	slices.Sort(b.reads)
	if k := len(b.reads); k > 0 {
		p50, p99 = b.reads[k/2].Seconds()*1e3, b.reads[k*99/100].Seconds()*1e3
	}
	b.reads = nil
	return p50, p99
}

// hosts registers three hosts that beat now.
func (b *metaBench) hosts(ctx context.Context) error {
	c := b.clients[0]
	for i := range byte(3) {
		name, id := fmt.Sprintf("host-%d", i+1), append(make([]byte, 15), i+1)
		for _, cmd := range []*pb.Command{
			{Op: &pb.Command_RegisterHost{RegisterHost: &pb.RegisterHost{Host: &pb.Host{Name: name, DataAddr: name + ":1"}}}},
			{Op: &pb.Command_RegisterStore{RegisterStore: &pb.RegisterStore{Store: &pb.Store{Id: id, Incarnation: 1, Host: name, CapacityBytes: 1 << 50}}}}} {
			if _, err := c.Do(ctx, cmd); err != nil {
				return err
			}
		}
		if err := b.beat(ctx, i); err != nil {
			return err
		}
	}
	return nil
}

func (b *metaBench) beat(ctx context.Context, i byte) error {
	id := append(make([]byte, 15), i+1)
	_, err := b.clients[0].Renew(ctx, &pb.RenewRequest{Host: fmt.Sprintf("host-%d", i+1), Session: "bench", Usage: []*pb.StoreUsage{{Store: id, CapacityBytes: 1 << 50, State: "ok"}}})
	return err
}

// load lets all workers do something for a while, beside heartbeats and a
// reader, and returns how much was done and what it cost.
func (b *metaBench) load(ctx context.Context, do func(ctx context.Context, c *metaclient.Client, worker int) (int, error)) (n int64, cpu time.Duration, err error) {
	var done atomic.Int64
	var wg sync.WaitGroup
	b.until = time.Now().Add(b.each)
	end, cancel := context.WithDeadline(ctx, b.until)
	defer cancel()
	errs := make(chan error, metaClients*metaFlights+2)
	began, err := b.m.cpuTime()
	if err != nil {
		return 0, 0, err
	}
	for w := range metaClients * metaFlights {
		wg.Go(func() {
			for end.Err() == nil {
				k, err := do(ctx, b.clients[w%metaClients], w)
				if err != nil {
					errs <- err
					return
				}
				if end.Err() == nil {
					done.Add(int64(k))
				}
			}
		})
	}
	wg.Go(func() { errs <- b.read(ctx) })
	wg.Go(func() {
		t := time.NewTicker(time.Second)
		defer t.Stop()
		for end.Err() == nil {
			for i := range byte(3) {
				if err := b.beat(ctx, i); err != nil {
					errs <- err
					return
				}
			}
			select {
			case <-t.C:
			case <-end.Done():
			}
		}
	})
	wg.Wait()
	ended, err := b.m.cpuTime()
	close(errs)
	for e := range errs {
		err = errors.Join(err, e)
	}
	return done.Load(), ended - began, err
}

// metaReadEvery is when the next read is due, whether the one before is answered
// or not: what waits behind a slow one has waited since then.
const metaReadEvery = 5 * time.Millisecond

// read has a process of its own ask, as the hosts' do: in this one a read would
// wait for its turn among 128 clients.
func (b *metaBench) read(ctx context.Context) error {
	cmd := exec.CommandContext(ctx, b.bin, "bench", "meta-reader", strings.Join(b.m.apis(), ","), b.each.String())
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("the reader: %w", err)
	}
	var took []time.Duration
	if err := json.Unmarshal(out, &took); err != nil {
		return fmt.Errorf("the reader's answer: %w", err)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.reads = append(b.reads, took...)
	return nil
}

// ReadMeta asks metadata linearizably for a while, at a steady rate, and writes how
// long each answer took, in nanoseconds, as a list in JSON.
func ReadMeta(ctx context.Context, w io.Writer, addrs []string, each time.Duration) (err error) {
	c := metaclient.New(metaclient.Config{Who: "bench", Addrs: addrs})
	defer func() { err = errors.Join(err, c.Close()) }()
	took := []time.Duration{}
	began := time.Now()
	for due := began; due.Sub(began) < each; due = due.Add(metaReadEvery) {
		time.Sleep(time.Until(due))
		if _, err := c.Query(ctx, &pb.QueryRequest{Q: &pb.QueryRequest_Hosts{Hosts: true}}); err != nil {
			return err
		}
		took = append(took, time.Since(due))
	}
	return json.NewEncoder(w).Encode(took)
}

// leaderLoss kills the leader and times the next command.
func (b *metaBench) leaderLoss(ctx context.Context) (ms float64, err error) {
	nodes, err := b.clients[1].Members(ctx)
	if err != nil {
		return 0, err
	}
	for i, p := range b.m.peers {
		if !slices.ContainsFunc(nodes, func(n *pb.NodeReply) bool { return n.Leader && n.Name == p.id }) {
			continue
		}
		at := time.Now()
		if err := b.m.nodes[i].kill(); err != nil {
			return 0, err
		}
		b.m.nodes[i] = nil
		if _, err := b.clients[1].Do(ctx, &pb.Command{Op: &pb.Command_CreateVolume{CreateVolume: &pb.CreateVolume{Name: "after", SizeBytes: 1 << 30}}}); err != nil {
			return 0, err
		}
		return time.Since(at).Seconds() * 1e3, nil
	}
	return 0, errors.New("no metadata node leads")
}

func printMeta(cfg Config, f *MetaFigures) error {
	if cfg.JSON {
		enc := json.NewEncoder(cfg.Out)
		enc.SetIndent("", "  ")
		return enc.Encode(f)
	}
	var out strings.Builder
	fmt.Fprintf(&out, "metadata, three nodes, a process each, %v each\n", cfg.Each)
	for _, p := range f.Paced {
		fmt.Fprintf(&out, "linearizable read   p50 %.2f ms, p99 %.2f ms, beside %.0f creations a second, %d in a command, and %.0f allocations, goal p99 < 10: %s\n",
			p.ReadP50Ms, p.ReadP99Ms, p.Creates, p.Batch, p.Chunks, met(p.ReadP99Ms < 10 && p.Creates >= 1000 && p.Chunks >= 5000))
	}
	for _, c := range f.Creates {
		fmt.Fprintf(&out, "volume creations    %8.0f /s   %6.0f µs CPU each (three nodes and clients), %d in a command, goal ≥ 1000: %s\n",
			c.PerSecond, c.CPUUs, c.Batch, met(c.PerSecond >= 1000))
	}
	fmt.Fprintf(&out, `chunk allocations   %8.0f /s   %6.1f µs CPU each, %d in a command, goal ≥ 5000: %s
linearizable read   p50 %.2f ms, p99 %.2f ms, beside creations or allocations that ask for all there is
leader lost         %.0f ms until the next command is answered, goal < 4000: %s
`, f.ChunksPerSecond, f.ChunkCPUUs, allocBatch, met(f.ChunksPerSecond >= 5000), f.FullReadP50Ms, f.FullReadP99Ms, f.LeaderLossMs, met(f.LeaderLossMs < 4000))
	_, err := io.WriteString(cfg.Out, out.String())
	return err
}
