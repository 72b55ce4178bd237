package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// slowView is a slow request as `cairn why -o json` shows it:
// total = queue + before + the slowest answer + after.
type slowView struct {
	Ended    string    `json:"ended"`
	Op       string    `json:"op"`
	FUA      bool      `json:"fua,omitempty"`
	Offset   uint64    `json:"offset"`
	Length   uint64    `json:"length"`
	Result   string    `json:"result"`
	TotalUs  uint64    `json:"totalUs"`
	QueueUs  uint64    `json:"queueUs"`  // read off the client's socket, not yet with the engine
	BeforeUs uint64    `json:"beforeUs"` // with the engine, no replica asked yet
	AfterUs  uint64    `json:"afterUs"`  // all needed answers there, not done yet
	Replicas []legView `json:"replicas"`
}

type legView struct {
	Host      string `json:"host"`
	Store     string `json:"store"`
	Answered  bool   `json:"answered"` // false: the request ended without it
	TimeUs    uint64 `json:"timeUs"`
	NetworkUs uint64 `json:"networkUs"`
	StoreUs   uint64 `json:"storeUs"`
}

func viewSlow(q *pb.SlowRequest) slowView {
	w := slowView{Ended: time.Unix(0, q.EndedUnixNs).Format("15:04:05.000"), Op: q.Op, FUA: q.Fua, Offset: q.Offset, Length: q.Length,
		Result: status.Kind(q.Status).String(), TotalUs: q.TotalUs, QueueUs: q.QueueUs, BeforeUs: q.BeforeUs, AfterUs: q.AfterUs, Replicas: []legView{}}
	for _, l := range q.Legs {
		w.Replicas = append(w.Replicas, legView{Host: l.Host, Store: fmt.Sprintf("%x", l.Store), Answered: l.Answered, TimeUs: l.TimeUs,
			NetworkUs: l.TimeUs - min(l.StoreUs, l.TimeUs), StoreUs: l.StoreUs})
	}
	return w
}

// slowest is the replica the request has waited for: of those that answered,
// the last.
func (w *slowView) slowest() legView {
	var out legView
	for _, l := range w.Replicas {
		if l.Answered && l.TimeUs >= out.TimeUs {
			out = l
		}
	}
	return out
}

// stages are where the time went, in the order it passed.
func (w *slowView) stages() (names [5]string, us [5]uint64) {
	l := w.slowest()
	return [5]string{"queue", "engine", "network", "store", "after"}, [5]uint64{w.QueueUs, w.BeforeUs, l.NetworkUs, l.StoreUs, w.AfterUs}
}

// barWidth is the length of a bar in characters.
const barWidth = 30

// bar draws the stages, a letter each, to the scale of the request's total.
func (w *slowView) bar() string {
	names, us := w.stages()
	sum := uint64(0)
	for _, n := range us {
		sum += n
	}
	if sum == 0 {
		return ""
	}
	var b strings.Builder
	passed, drawn := uint64(0), 0
	for i, n := range us {
		passed += n
		upTo := int((passed*barWidth + sum/2) / sum)
		b.WriteString(strings.Repeat(names[i][:1], upTo-drawn))
		drawn = upTo
	}
	return b.String()
}

// verdict says in one sentence what the slow requests have waited for most.
func verdict(ws []slowView) string {
	sums, total := map[string]uint64{}, uint64(0)
	for i := range ws {
		names, us := ws[i].stages()
		host := ws[i].slowest().Host
		for k, n := range us {
			what := names[k]
			if (what == "network" || what == "store") && host != "" {
				what += " of " + host
			}
			sums[what] += n
			total += n
		}
	}
	most := ""
	for what, n := range sums {
		if most == "" || n > sums[most] || n == sums[most] && what < most {
			most = what
		}
	}
	if total == 0 {
		return "No request took measurable time."
	}
	return fmt.Sprintf("These %d requests spent %d %% of their time in: %s.", len(ws), 100*sums[most]/total, most)
}

func whyCommand(c *cli) *cobra.Command {
	var out outputFlag
	var volume string
	var top int
	cmd := &cobra.Command{
		Use:   "why --volume NAME",
		Short: "Show where the time of a volume's slowest requests went",
		Long: `Show where the time of a volume's slowest requests of the last minute or two went.

  queue    the request was read off the client's socket and waited for the engine
  engine   with the engine, before a replica was asked: an attach, a chunk's allocation,
           an earlier write on its blocks, the flush before
  network  between the gateway and the replica whose answer came last
  store    that replica's server: its queue and its disk
  after    all answers were there: an exclusion's commit, a lease, a write a read may have seen`,
		Example: "  cairn why --volume db\n  cairn why --volume db --top 5 -o json",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.with(cmd.Context(), cliWait, func(ctx context.Context, s *session) error {
				rep, err := heldBy(ctx, s, volume, func(ctx context.Context, hc pb.HostControlClient) (*pb.SlowRequestsReply, error) {
					return hc.SlowRequests(ctx, &pb.VolumeRef{Volume: volume})
				})
				if err == nil {
					err = status.New(status.Kind(rep.Status), rep.Detail)
				}
				if err != nil {
					return err
				}
				return showSlow(&out, rep, top)
			})
		},
	}
	out.register(cmd)
	cmd.Flags().StringVar(&volume, "volume", "", "the volume")
	cmd.Flags().IntVar(&top, "top", 15, "how many requests to show")
	must(cmd.MarkFlagRequired("volume"))
	return cmd
}

func showSlow(out *outputFlag, rep *pb.SlowRequestsReply, top int) error {
	ws, rows := []slowView{}, [][]string{}
	for _, q := range rep.Requests[:min(max(top, 0), len(rep.Requests))] {
		w := viewSlow(q)
		ws = append(ws, w)
		_, us := w.stages()
		op := w.Op
		if w.FUA {
			op += "+fua"
		}
		row := []string{w.Ended, op, formatSize(w.Offset), formatSize(w.Length), formatUs(w.TotalUs)}
		for _, n := range us {
			row = append(row, formatUs(n))
		}
		rows = append(rows, append(row, dash(w.slowest().Host), missing(w.Replicas), w.bar()))
	}
	if err := out.show(ws, []string{"ENDED", "OP", "AT", "SIZE", "TOTAL", "QUEUE", "ENGINE", "NETWORK", "STORE", "AFTER", "WAITED FOR", "NO ANSWER", "QUEUE ENGINE NETWORK STORE AFTER"}, rows); err != nil {
		return err
	}
	if out.format == "table" {
		say("%s", verdict(ws))
	}
	return nil
}

// missing names the replicas a request went on without.
func missing(ls []legView) string {
	var out []string
	for _, l := range ls {
		if !l.Answered {
			out = append(out, fmt.Sprintf("%s for %s", l.Host, formatUs(l.TimeUs)))
		}
	}
	return dash(strings.Join(out, ", "))
}

// formatUs writes a time as people read it: three digits.
func formatUs(us uint64) string {
	switch {
	case us < 1000:
		return fmt.Sprintf("%d µs", us)
	case us < 1000*1000:
		return fmt.Sprintf("%.3g ms", float64(us)/1e3)
	}
	return fmt.Sprintf("%.3g s", float64(us)/1e6)
}

// heldBy asks the host that holds a volume.
func heldBy[R any](ctx context.Context, s *session, name string, ask func(context.Context, pb.HostControlClient) (R, error)) (r R, err error) {
	v, err := s.volume(ctx, name)
	if err != nil {
		return r, err
	}
	if v.HolderHost == "" {
		return r, status.Errorf(status.NotFound, "volume %s is not attached, so nobody uses it: `cairn volume attach %s` attaches it", name, name)
	}
	return onHost(ctx, s, v.HolderHost, ask)
}

// statsView is what `cairn volume stats -o json` shows.
type statsView struct {
	Volume      string   `json:"volume"`
	Connections uint32   `json:"connections"`
	InFlight    uint64   `json:"inFlight"`
	FlightBytes uint64   `json:"inFlightBytes"`
	Ops         []opView `json:"ops"`
}

type opView struct {
	Op      string       `json:"op"`
	Done    uint64       `json:"done"` // failures included
	Failed  uint64       `json:"failed"`
	Bytes   uint64       `json:"bytes"`
	MeanUs  uint64       `json:"meanUs"`
	P50Us   uint64       `json:"p50Us"`
	P99Us   uint64       `json:"p99Us"`
	P999Us  uint64       `json:"p999Us"`
	MaxUs   uint64       `json:"maxUs"`
	Buckets []bucketView `json:"buckets"`
}

type bucketView struct {
	MaxUs uint64 `json:"maxUs"`
	Count uint64 `json:"count"`
}

func volumeStats(c *cli) *cobra.Command {
	var out outputFlag
	cmd := &cobra.Command{
		Use:     "stats NAME",
		Short:   "Show what a volume's NBD clients do: counts, errors, bytes, latencies",
		Example: "  cairn volume stats db\n  cairn volume stats db -o json | jq '.ops[] | select(.op==\"write\").p99Us'",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.with(cmd.Context(), cliWait, func(ctx context.Context, s *session) error {
				rep, err := heldBy(ctx, s, args[0], func(ctx context.Context, hc pb.HostControlClient) (*pb.VolumeStatsReply, error) {
					return hc.VolumeStats(ctx, &pb.VolumeRef{Volume: args[0]})
				})
				if err == nil {
					err = status.New(status.Kind(rep.Status), rep.Detail)
				}
				if err != nil {
					return err
				}
				return showStats(&out, args[0], rep)
			})
		},
	}
	out.register(cmd)
	return cmd
}

func showStats(out *outputFlag, name string, rep *pb.VolumeStatsReply) error {
	w := statsView{Volume: name, Connections: rep.Connections, InFlight: rep.InFlight, FlightBytes: rep.InFlightBytes, Ops: []opView{}}
	var rows [][]string
	for _, o := range rep.Ops {
		v := opView{Op: o.Op, Done: o.Done, Failed: o.Failed, Bytes: o.Bytes, MeanUs: o.SumUs / max(o.Done, 1), P50Us: o.P50Us, P99Us: o.P99Us, P999Us: o.P999Us, MaxUs: o.MaxUs, Buckets: []bucketView{}}
		for _, b := range o.Buckets {
			v.Buckets = append(v.Buckets, bucketView{MaxUs: b.MaxUs, Count: b.Count})
		}
		w.Ops = append(w.Ops, v)
		rows = append(rows, []string{v.Op, fmt.Sprint(v.Done), fmt.Sprint(v.Failed), formatSize(v.Bytes), formatUs(v.MeanUs), formatUs(v.P50Us), formatUs(v.P99Us), formatUs(v.P999Us), formatUs(v.MaxUs)})
	}
	if err := out.show(w, []string{"OP", "DONE", "FAILED", "DATA", "MEAN", "P50", "P99", "P99.9", "MAX"}, rows); err != nil {
		return err
	}
	if out.format == "table" {
		say("%d connections, %d requests of %s in flight", w.Connections, w.InFlight, formatSize(w.FlightBytes))
	}
	return nil
}
