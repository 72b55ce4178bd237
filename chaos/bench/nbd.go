package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"text/tabwriter"
	"time"

	nbdserver "github.com/cairnstore/cairn/nbd/server"
)

// nbdJob is a load with what it has to reach against each of the others.
type nbdJob struct {
	job
	ratio float64 // smallest good ratio of I/O per second
	cpu   float64 // largest good ratio of the server's CPU per I/O; 0: none set
}

var nbdJobs = []nbdJob{
	{job{name: "4k random write, depth 32", rw: "randwrite", block: "4k", depth: 32}, 2, 0.6},
	{job{name: "4k random read, depth 32", rw: "randread", block: "4k", depth: 32}, 2, 0.6},
	{job{name: "4k random write, depth 1", rw: "randwrite", block: "4k", depth: 1}, 1.6, 0.6},
	{job{name: "4k random read, depth 1", rw: "randread", block: "4k", depth: 1}, 1.6, 0.6},
	{job{name: "1M write, depth 4", rw: "write", block: "1M", depth: 4}, 1.5, 0},
	{job{name: "1M read, depth 4", rw: "read", block: "1M", depth: 4}, 1.5, 0},
}

// NBDResult is what `cairn bench nbd -o json` prints.
type NBDResult struct {
	SizeBytes uint64         `json:"sizeBytes"`
	Rounds    int            `json:"rounds"`
	RunS      float64        `json:"runSeconds"`
	Others    []string       `json:"others"` // what cairn is compared with, and how they ran
	Jobs      []NBDJobResult `json:"jobs"`
}

// NBDJobResult is one load on every server.
type NBDJobResult struct {
	Name    string       `json:"name"`
	Cairn   Figures      `json:"cairn"`
	Against []NBDAgainst `json:"against"` // in the order of NBDResult.Others
}

// NBDAgainst is another server's run of the same load.
type NBDAgainst struct {
	Figures  Figures `json:"figures"`
	Ratio    float64 `json:"ratio"`    // median of the rounds' ratios of I/O per second, cairn's over it
	CPURatio float64 `json:"cpuRatio"` // the same of the server's CPU per I/O
	Target   float64 `json:"target"`
	Met      bool    `json:"met"` // both the rate's and the CPU's target
}

// ramSide is cairn's NBD server over memory, in this process, which does
// nothing else meanwhile.
type ramSide struct {
	server *nbdserver.Server
	socket string
	served chan error
}

func startRAM(dir string, sizeBytes uint64) (*ramSide, error) {
	s := &ramSide{server: nbdserver.New(nbdserver.Config{Exports: NewRAM(sizeBytes)}), socket: filepath.Join(dir, "cairn.sock"), served: make(chan error, 1)}
	l, err := nbdserver.ListenUnix(nbdserver.Socket{Path: s.socket})
	if err != nil {
		return nil, errors.Join(err, s.server.Close(context.Background()))
	}
	go func() { s.served <- s.server.Serve(l) }()
	return s, nil
}

func (s *ramSide) label() string        { return "cairn, memory" }
func (s *ramSide) uri() string          { return "nbd+unix:///v?socket=" + s.socket }
func (s *ramSide) pids() ([]int, error) { return []int{os.Getpid()}, nil }

func (s *ramSide) close() error {
	ctx, cancel := context.WithTimeout(context.Background(), startMaxWait)
	defer cancel()
	err := s.server.Close(ctx)
	if serr := <-s.served; !errors.Is(serr, nbdserver.ErrClosed) {
		err = errors.Join(err, serr)
	}
	return err
}

// RunNBD measures the NBD server alone: cairn's over memory beside nbdkit's
// memory plugin and qemu-nbd on a raw file in the page cache. Config.Bin is
// not used.
func RunNBD(ctx context.Context, cfg Config) (err error) {
	cfg.Bin = "unused"
	if cfg.SizeBytes == 0 {
		cfg.SizeBytes = 256 << 20
	}
	if err := cfg.defaults(); err != nil {
		return err
	}
	if _, err := exec.LookPath("nbdkit"); err != nil {
		return errors.New("the benchmark needs nbdkit: `apt-get install nbdkit` brings it")
	}
	dir, err := os.MkdirTemp(cfg.Dir, "cairn-bench-")
	if err != nil {
		return fmt.Errorf("no directory for the disks: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	b := &bench{cfg: cfg, samples: map[string]map[string][]sample{}}
	r, err := b.nbd(ctx, dir)
	if ctx.Err() != nil {
		return fmt.Errorf("the benchmark was interrupted: %w", ctx.Err())
	}
	if err != nil {
		return err
	}
	return r.print(cfg)
}

func (b *bench) nbd(ctx context.Context, dir string) (r *NBDResult, err error) {
	ram, err := startRAM(dir, b.cfg.SizeBytes)
	if err != nil {
		return nil, err
	}
	sides := []side{ram}
	defer func() {
		for _, s := range sides {
			err = errors.Join(err, s.close())
		}
	}()
	kit := filepath.Join(dir, "kit.sock")
	p, err := startExport(ctx, "nbdkit memory, its defaults", kit, "nbdkit", "-f", "-U", kit, "-e", "v", "memory", fmt.Sprint(b.cfg.SizeBytes))
	if err != nil {
		return nil, err
	}
	sides = append(sides, p)
	// Its defaults, spelled out: the page cache, and a pool of threads.
	if p, err = startQemu(ctx, dir, b.cfg.SizeBytes); err != nil {
		return nil, err
	}
	p.name = "qemu-nbd on a raw file, cache=writeback aio=threads"
	sides = append(sides, p)
	r = &NBDResult{SizeBytes: b.cfg.SizeBytes, Rounds: b.cfg.Rounds, RunS: b.cfg.Each.Seconds()}
	for _, s := range sides[1:] {
		r.Others = append(r.Others, s.label())
	}
	for _, s := range sides { // no side serves holes
		if _, err := b.run(ctx, s, fill, 0); err != nil {
			return nil, err
		}
	}
	for round := range b.cfg.Rounds {
		for _, j := range nbdJobs {
			b.talk("round %d of %d: %s", round+1, b.cfg.Rounds, j.name)
			if b.samples[j.name] == nil {
				b.samples[j.name] = map[string][]sample{}
			}
			for i := range sides { // who goes first changes every round
				s := sides[(i+round)%len(sides)]
				got, err := b.run(ctx, s, j.job, b.cfg.Each)
				if err != nil {
					return nil, err
				}
				b.samples[j.name][s.label()] = append(b.samples[j.name][s.label()], got)
			}
		}
	}
	for _, j := range nbdJobs {
		own := b.samples[j.name][ram.label()]
		res := NBDJobResult{Name: j.name, Cairn: figures(own)}
		for _, s := range sides[1:] {
			res.Against = append(res.Against, j.against(own, b.samples[j.name][s.label()]))
		}
		r.Jobs = append(r.Jobs, res)
	}
	return r, nil
}

// against pairs the rounds, as compare does.
func (j nbdJob) against(own, other []sample) NBDAgainst {
	var io, cpu []float64
	for i := range own {
		io = append(io, own[i].IOPerS/other[i].IOPerS)
		cpu = append(cpu, own[i].ServerCPUUs/other[i].ServerCPUUs)
	}
	a := NBDAgainst{Figures: figures(other), Ratio: median(io), CPURatio: median(cpu), Target: j.ratio}
	a.Met = a.Ratio >= j.ratio && (j.cpu == 0 || a.CPURatio <= j.cpu)
	return a
}

func (r *NBDResult) print(cfg Config) error {
	if cfg.JSON {
		enc := json.NewEncoder(cfg.Out)
		enc.SetIndent("", "  ")
		return enc.Encode(r)
	}
	if _, err := fmt.Fprintf(cfg.Out, "cairn's NBD server over memory, unix socket, fio's nbd engine, %d MiB, medians of %d rounds of %v\n\n",
		r.SizeBytes>>20, r.Rounds, time.Duration(r.RunS*float64(time.Second))); err != nil {
		return err
	}
	w := tabwriter.NewWriter(cfg.Out, 0, 0, 2, ' ', tabwriter.AlignRight)
	const row = "%-*s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t\n"
	fmt.Fprintf(w, row, nameWidth, "", "IO/s", "p99 µs", "CPU µs", "fio µs", "ratio", "CPU", "")
	for _, j := range r.Jobs {
		fmt.Fprintf(w, row, nameWidth, j.Name, fmt.Sprintf("%.0f", j.Cairn.IOPerS), fmt.Sprintf("%.0f", j.Cairn.P99Us), fmt.Sprintf("%.1f", j.Cairn.ServerCPUUs), fmt.Sprintf("%.1f", j.Cairn.ClientCPUUs), "", "", "")
		for i, a := range j.Against {
			fmt.Fprintf(w, row, nameWidth, "  "+firstWord(r.Others[i]), fmt.Sprintf("%.0f", a.Figures.IOPerS), fmt.Sprintf("%.0f", a.Figures.P99Us), fmt.Sprintf("%.1f", a.Figures.ServerCPUUs),
				fmt.Sprintf("%.1f", a.Figures.ClientCPUUs), fmt.Sprintf("%.2f", a.Ratio), fmt.Sprintf("%.2f", a.CPURatio), fmt.Sprintf("≥ %g %s", a.Target, met(a.Met)))
		}
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if _, err := fmt.Fprintf(cfg.Out, "\nratio: cairn's IO/s over the other's; CPU: cairn's server CPU per I/O over the other's, target ≤ 0.6 at 4k. fio µs: the client's own.\n"); err != nil {
		return err
	}
	for _, o := range r.Others {
		if _, err := fmt.Fprintf(cfg.Out, "against %s\n", o); err != nil {
			return err
		}
	}
	return nil
}

func firstWord(s string) string {
	for i, c := range s {
		if c == ' ' || c == ',' {
			return s[:i]
		}
	}
	return s
}
