package bench

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

func TestStatCPU(t *testing.T) {
	const rest = " S 1 2 3 4 5 6 7 8 9 10 150 25 7 8 20 0 1"
	for _, name := range []string{"qemu-nbd", "a) b (c", "x y"} {
		got, err := statCPU(fmt.Sprintf("77 (%s)%s", name, rest))
		if err != nil || got != 1750*time.Millisecond {
			t.Errorf("name %q: %v, %v; want 1.75 s", name, got, err)
		}
	}
	if _, err := statCPU("77 (short) S 1 2"); err == nil {
		t.Error("a short line is accepted")
	}
	for used := time.Duration(0); used == 0; { // burns until a tick is counted
		var err error
		if used, err = cpuOf([]int{os.Getpid()}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := cpuOf([]int{os.Getpid(), 1 << 30}); err == nil {
		t.Error("a process that ended is counted as using nothing")
	}
}

func TestMedian(t *testing.T) {
	for _, c := range []struct {
		in   []float64
		want float64
	}{{nil, 0}, {[]float64{3}, 3}, {[]float64{9, 1, 5}, 5}, {[]float64{4, 1, 2, 9}, 3}} {
		if got := median(c.in); got != c.want {
			t.Errorf("median of %v = %v, want %v", c.in, got, c.want)
		}
	}
}

func TestParseFio(t *testing.T) {
	const report = `fio: connected to NBD server
{"jobs":[{"error":%d,"read":{"iops":5,"total_ios":10,"lat_ns":{"max":9000},"clat_ns":{"percentile":{"99.000000":7000}}},
"write":{"iops":3,"total_ios":%d}}]}`
	side, err := parseFio(fmt.Appendf(nil, report, 0, 4), job{rw: "randread"})
	if err != nil || side.IOPS != 5 || side.TotalIOs != 10 || side.Lat.MaxNs != 9000 || side.Clat.Percentile["99.000000"] != 7000 {
		t.Errorf("got %+v, %v", side, err)
	}
	if side, err = parseFio(fmt.Appendf(nil, report, 0, 4), job{rw: "randwrite"}); err != nil || side.IOPS != 3 {
		t.Errorf("got %+v, %v", side, err)
	}
	for _, bad := range []struct{ out, says string }{
		{"fio: connection refused", "no report"},
		{"{]", "cannot be read"},
		{`{"jobs":[]}`, "0 jobs"},
		{fmt.Sprintf(report, 5, 4), "input/output error"},
		{fmt.Sprintf(report, 0, 0), "no I/O"},
	} {
		if _, err := parseFio([]byte(bad.out), job{rw: "randwrite"}); err == nil || !strings.Contains(err.Error(), bad.says) {
			t.Errorf("%.30s: got %v, want %q", bad.out, err, bad.says)
		}
	}
}

// The reference side is real: fio against qemu-nbd, and nothing is left.
func TestReferenceSide(t *testing.T) {
	for _, need := range []string{"fio", "qemu-nbd"} {
		if _, err := exec.LookPath(need); err != nil {
			t.Fatalf("%s is not installed: `make deps`", need)
		}
	}
	const size = 8 << 20
	q, err := startQemu(t.Context(), t.TempDir(), size)
	if err != nil {
		t.Fatal(err)
	}
	pids, err := q.pids()
	if err != nil {
		t.Fatal(err)
	}
	for _, j := range append([]job{fill}, jobs...) {
		s, err := runFio(t.Context(), j, q.uri(), size, 200*time.Millisecond, pids)
		if err != nil {
			t.Fatal(err)
		}
		if s.IOPerS <= 0 || s.P99Us <= 0 || s.LongestUs <= 0 || s.ClientCPUUs <= 0 {
			t.Errorf("%s: %+v", j.name, s)
		}
	}
	if err := q.close(); err != nil {
		t.Fatal(err)
	}
	if _, err := runFio(t.Context(), jobs[0], q.uri(), size, 200*time.Millisecond, nil); err == nil {
		t.Error("fio against a server that is gone is no error")
	}
}

func TestResult(t *testing.T) {
	b := &bench{cfg: Config{Rounds: 3, Each: time.Second, SizeBytes: 1 << 30}, samples: map[string]map[string][]sample{}}
	for _, j := range jobs {
		b.samples[j.name] = map[string][]sample{
			sideCairn:     {{IOPerS: 90}, {IOPerS: 10}, {IOPerS: 110}},
			sideReference: {{IOPerS: 100}, {IOPerS: 100}, {IOPerS: 100}},
		}
	}
	b.stalls, b.calm = []float64{40_000, 501_000, 30_000}, []float64{2000, 1000, 3000}
	r := b.result()
	if j := r.Jobs[0]; j.Ratio != 0.9 || !j.Met || j.Cairn.IOPerSMin != 10 || j.Cairn.IOPerSMax != 110 {
		t.Errorf("first job: %+v", j)
	}
	if r.Jobs[1].Met || !r.Jobs[2].Met {
		t.Errorf("0.9 against 1.5 counts as met, or a job without a target as missed: %+v", r.Jobs)
	}
	if r.Kill.LongestWriteMs != 40 || r.Kill.WithoutAKillMs != 2 || r.Kill.Met {
		t.Errorf("one kill of 501 ms: %+v", r.Kill)
	}
	var out bytes.Buffer
	if err := r.print(&out, true); err != nil {
		t.Fatal(err)
	}
	var again Result
	if err := json.Unmarshal(out.Bytes(), &again); err != nil || again.Jobs[0].Ratio != 0.9 {
		t.Errorf("the JSON does not read back: %v, %s", err, out.String())
	}
	out.Reset()
	if err := r.print(&out, false); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"0.90", "≥ 0.8", "missed", "longest write 40 ms (each: 40, 501, 30)"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the table lacks %q:\n%s", want, out.String())
		}
	}
	t.Logf("\n%s", out.String())
}

// The NBD server's comparison, short: three servers, every load.
func TestRunNBD(t *testing.T) {
	dir := t.TempDir()
	var out bytes.Buffer
	cfg := Config{Dir: dir, Out: &out, JSON: true, Rounds: 1, Each: 200 * time.Millisecond, SizeBytes: 32 << 20}
	if err := RunNBD(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	var r NBDResult
	if err := json.Unmarshal(out.Bytes(), &r); err != nil {
		t.Fatal(err)
	}
	if len(r.Jobs) != len(nbdJobs) || len(r.Others) != 2 {
		t.Errorf("%+v", r)
	}
	for _, j := range r.Jobs {
		if j.Cairn.IOPerS <= 0 || j.Cairn.ServerCPUUs <= 0 || len(j.Against) != 2 || j.Against[0].Ratio <= 0 || j.Against[1].Figures.ServerCPUUs <= 0 {
			t.Errorf("%+v", j)
		}
	}
	out.Reset()
	if err := r.print(Config{Out: &out}); err != nil || !strings.Contains(out.String(), "aio=threads") {
		t.Errorf("%v: %s", err, out.String())
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v (%v)", left, err)
	}
}

// The whole of it, short: both sides, every job, a kill, and nothing left.
func TestRun(t *testing.T) {
	bin := os.Getenv("CAIRN_BIN")
	if bin == "" {
		t.Fatal("CAIRN_BIN names no cairn binary: run by `make test-int`")
	}
	dir := t.TempDir()
	var out, talk bytes.Buffer
	cfg := Config{Bin: bin, Dir: dir, Out: &out, Talk: &talk, JSON: true, Rounds: 1, Each: 300 * time.Millisecond, SizeBytes: 64 << 20}
	if err := Run(t.Context(), cfg); err != nil {
		t.Fatalf("%v\n%s", err, talk.String())
	}
	var r Result
	if err := json.Unmarshal(out.Bytes(), &r); err != nil {
		t.Fatal(err)
	}
	if len(r.Jobs) != len(jobs) || len(r.Kill.EachMs) != 1 || r.Kill.LongestWriteMs <= 0 {
		t.Errorf("%+v", r)
	}
	for _, j := range r.Jobs {
		if j.Ratio <= 0 || j.Cairn.ServerCPUUs <= 0 || j.Reference.ServerCPUUs <= 0 {
			t.Errorf("%+v", j)
		}
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v (%v)", left, err)
	}
}
