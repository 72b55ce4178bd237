package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// job is one kind of load, the same for every side.
type job struct {
	name   string
	rw     string  // fio's --rw
	block  string  // fio's --bs
	depth  int     // operations in flight
	fsync  bool    // a flush after every write, as a database's log does
	target float64 // smallest ratio to the reference that is good enough; 0: none set
}

// jobs are what a round measures, in this order.
var jobs = []job{
	{name: "random write, depth 32", rw: "randwrite", block: "4k", depth: 32, target: 0.8},
	{name: "random read, depth 32", rw: "randread", block: "4k", depth: 32, target: 1.5},
	{name: "random write, depth 1", rw: "randwrite", block: "4k", depth: 1},
	{name: "write + flush, depth 1", rw: "randwrite", block: "4k", depth: 1, fsync: true},
}

// fill writes every block once, so that no side serves holes.
var fill = job{name: "fill", rw: "write", block: "1M", depth: 4}

// sample is one run of one job on one side.
type sample struct {
	IOPerS      float64
	P99Us       float64
	LongestUs   float64
	ServerCPUUs float64 // per I/O, over all server processes
	ClientCPUUs float64 // per I/O, fio's own
}

// fioReport is the part of fio's JSON that is used.
type fioReport struct {
	Jobs []struct {
		Error int     `json:"error"`
		Read  fioSide `json:"read"`
		Write fioSide `json:"write"`
	} `json:"jobs"`
}

type fioSide struct {
	IOPS     float64 `json:"iops"`
	TotalIOs float64 `json:"total_ios"`
	Lat      struct {
		MaxNs float64 `json:"max"`
	} `json:"lat_ns"`
	Clat struct {
		Percentile map[string]float64 `json:"percentile"`
	} `json:"clat_ns"`
}

// runFio runs a job against an NBD URI for d, or once over the whole size when
// d is zero. pids are the side's server processes.
func runFio(ctx context.Context, j job, uri string, sizeBytes uint64, d time.Duration, pids []int) (sample, error) {
	args := []string{"--name=cairn", "--ioengine=nbd", "--uri=" + uri, "--rw=" + j.rw, "--bs=" + j.block,
		"--iodepth=" + strconv.Itoa(j.depth), "--size=" + strconv.FormatUint(sizeBytes, 10),
		"--thread", "--norandommap", "--output-format=json"}
	if j.fsync {
		args = append(args, "--fsync=1")
	}
	if d > 0 {
		args = append(args, "--time_based", "--runtime="+strconv.FormatInt(d.Milliseconds(), 10)+"ms")
	}
	before, err := cpuOf(pids)
	if err != nil {
		return sample{}, err
	}
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, "fio", args...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	// A cancelled fio ends its job and reports; killed, it may leave threads waiting on a socket.
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 5 * time.Second
	if err := cmd.Run(); ctx.Err() != nil {
		return sample{}, ctx.Err()
	} else if err != nil {
		return sample{}, fmt.Errorf("fio (%s) on %s: %w: %s", j.name, uri, err, lastLines(stderr.String()+stdout.String()))
	}
	after, err := cpuOf(pids)
	if err != nil {
		return sample{}, err
	}
	side, err := parseFio(stdout.Bytes(), j)
	if err != nil {
		return sample{}, err
	}
	used := max(after-before, clockTick) // what is too short to be seen is counted as what can be
	own := cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	return sample{
		IOPerS:      side.IOPS,
		P99Us:       side.Clat.Percentile["99.000000"] / 1000,
		LongestUs:   side.Lat.MaxNs / 1000,
		ServerCPUUs: float64(used.Microseconds()) / side.TotalIOs,
		ClientCPUUs: float64(own.Microseconds()) / side.TotalIOs,
	}, nil
}

// parseFio reads a report. The nbd engine prints a line of its own before the
// JSON, even into --output.
func parseFio(out []byte, j job) (fioSide, error) {
	at := bytes.IndexByte(out, '{')
	if at < 0 {
		return fioSide{}, fmt.Errorf("fio (%s) printed no report: %s", j.name, lastLines(string(out)))
	}
	var r fioReport
	if err := json.Unmarshal(out[at:], &r); err != nil {
		return fioSide{}, fmt.Errorf("fio (%s) printed a report that cannot be read: %w", j.name, err)
	}
	if len(r.Jobs) != 1 {
		return fioSide{}, fmt.Errorf("fio (%s) reported %d jobs, not one", j.name, len(r.Jobs))
	}
	if e := r.Jobs[0].Error; e != 0 {
		return fioSide{}, fmt.Errorf("fio (%s) was answered with an error: %w", j.name, syscall.Errno(e))
	}
	side := r.Jobs[0].Write
	if strings.HasSuffix(j.rw, "read") {
		side = r.Jobs[0].Read
	}
	if side.TotalIOs == 0 {
		return fioSide{}, fmt.Errorf("fio (%s) did no I/O at all", j.name)
	}
	return side, nil
}

// lastLines is the end of a program's talk, for an error.
func lastLines(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return strings.Join(lines[max(0, len(lines)-3):], "; ")
}
