package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/cairnstore/cairn/chunk/disk"
	"github.com/cairnstore/cairn/chunk/store"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// storePoll is how often a command asks how far a scrub is.
const storePoll = 250 * time.Millisecond

func storeCommand(c *cli) *cobra.Command {
	cmd := &cobra.Command{Use: "store", Short: "Stores: the disks of chunk servers"}
	cmd.AddCommand(storeListCommand(c), storeShowCommand(c), storeScrubCommand(c), storeVerifyCommand(c), storeRetireCommand(c), storeRemoveCommand(c), storeDumpCommand(), storeGrowCommand())
	return cmd
}

func storeListCommand(c *cli) *cobra.Command {
	var out outputFlag
	cmd := &cobra.Command{
		Use: "ls", Short: "List the stores", Args: cobra.NoArgs,
		Example: "  cairn store ls\n  cairn store ls -o json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.with(cmd.Context(), cliWait, func(ctx context.Context, s *session) error {
				hs, err := s.hostViews(ctx)
				if err != nil {
					return err
				}
				all, rows := []storeView{}, [][]string{}
				for _, h := range hs {
					for _, st := range h.Stores {
						all = append(all, st)
						rows = append(rows, []string{st.ID, st.Host, formatSize(st.Used), formatSize(st.Live), formatSize(st.Capacity), st.Class, fmt.Sprint(st.Incarnation), st.is()})
					}
				}
				return out.show(all, []string{"STORE", "HOST", "USED", "LIVE", "CAPACITY", "CLASS", "INCARNATION", "STATE"}, rows)
			})
		},
	}
	out.register(cmd)
	return cmd
}

// findStore finds a store by the beginning of its id.
func (s *session) findStore(ctx context.Context, name string) (*pb.Store, error) {
	hosts, err := s.hosts(ctx)
	if err != nil {
		return nil, err
	}
	var found []*pb.Store
	for _, h := range hosts {
		for _, st := range h.Stores {
			if name != "" && strings.HasPrefix(fmt.Sprintf("%x", st.Store.Id), strings.ToLower(name)) {
				found = append(found, st.Store)
			}
		}
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		return nil, status.Errorf(status.NotFound, "there is no store %q: `cairn store ls` lists them", name)
	}
	return nil, usagef("%q begins the ids of %d stores: write more of it", name, len(found))
}

// storeDetail is one store as `cairn store show -o json` shows it.
type storeDetail struct {
	ID          string            `json:"id"`
	Host        string            `json:"host"`
	Path        string            `json:"path"`
	Kind        string            `json:"kind"` // file, thin file, device
	Incarnation uint64            `json:"incarnation"`
	Openings    uint64            `json:"openings"`
	Size        uint64            `json:"sizeBytes"`
	Capacity    uint64            `json:"capacityBytes"`
	Used        uint64            `json:"usedBytes"`
	Live        uint64            `json:"liveBytes"`
	State       string            `json:"state"`
	Note        string            `json:"note"`
	Retired     bool              `json:"retired"`
	CopiesLeft  int               `json:"copiesLeft"` // volumes that still have this store as a member
	Volumes     map[string]uint64 `json:"volumesLiveBytes"`
	Scrub       scrubView         `json:"scrub"`
	Bad         []badView         `json:"badBlocks"`
}

type scrubView struct {
	Running   bool    `json:"running"`
	Percent   float64 `json:"percent"` // of the segments, by number
	ReadBytes uint64  `json:"readBytes"`
	Verified  uint64  `json:"blocksVerified"`
	BadBlocks uint64  `json:"badBlocks"`
	BadHeads  uint64  `json:"recordsWrittenAnew"`
	Unrescued uint64  `json:"recordsNotYetWrittenAnew"`
	Supers    uint64  `json:"superblocksWrittenAnew"`
	AgeS      int64   `json:"ageSeconds"` // since the last whole pass; -1: never
	Pace      uint64  `json:"bytesPerSecond"`
}

type badView struct {
	Volume uint64 `json:"volumeId"`
	Chunk  uint64 `json:"chunkId"`
	Layer  uint32 `json:"layer"`
	Block  uint32 `json:"block"`
}

// askStore asks a store's host about it.
func (s *session) askStore(ctx context.Context, st *pb.Store) (*pb.StoreReply, error) {
	rep, err := onHost(ctx, s, st.Host, func(ctx context.Context, h pb.HostControlClient) (*pb.StoreReply, error) {
		return h.ShowStore(ctx, &pb.StoreRef{Store: st.Id})
	})
	if err == nil {
		err = status.New(status.Kind(rep.Status), rep.Detail)
	}
	return rep, err
}

func (s *session) storeDetail(ctx context.Context, name string) (*storeDetail, error) {
	st, err := s.findStore(ctx, name)
	if err != nil {
		return nil, err
	}
	rep, away := s.askStore(ctx, st)
	vols, err := s.meta.Query(ctx, &pb.QueryRequest{Q: &pb.QueryRequest_Volumes{Volumes: true}})
	if err != nil {
		return nil, err
	}
	if away != nil {
		rep = &pb.StoreReply{Incarnation: st.Incarnation, Life: st.Life, Usage: &pb.StoreUsage{CapacityBytes: st.CapacityBytes, State: "not reached: " + away.Error()}}
	}
	d := &storeDetail{ID: fmt.Sprintf("%x", st.Id), Host: st.Host, Path: rep.Path, Kind: rep.Kind, Incarnation: rep.Incarnation, Openings: rep.Life, Size: rep.SizeBytes,
		Capacity: rep.Usage.GetCapacityBytes(), Used: rep.Usage.GetUsedBytes(), Live: rep.Usage.GetLiveBytes(), State: rep.Usage.GetState(), Note: rep.Note,
		Retired: st.Retired, Volumes: map[string]uint64{}, Scrub: viewScrub(rep.Scrub), Bad: []badView{}}
	names := map[uint64]string{}
	for _, v := range vols.Volumes {
		names[v.Id] = v.Name
		for _, m := range v.Members {
			if string(m.Store) == string(st.Id) {
				d.CopiesLeft++
			}
		}
	}
	for _, v := range rep.Volumes {
		n := names[v.VolumeId]
		if n == "" {
			n = fmt.Sprintf("id:%d", v.VolumeId)
		}
		d.Volumes[n] = v.LiveBytes
	}
	for _, b := range rep.Bad {
		d.Bad = append(d.Bad, badView{b.VolumeId, b.ChunkId, b.Layer, b.Block})
	}
	return d, nil
}

func viewScrub(s *pb.ScrubState) scrubView {
	v := scrubView{Running: s.GetRunning(), ReadBytes: s.GetReadBytes(), Verified: s.GetBlocks(), BadBlocks: s.GetBadBlocks(), BadHeads: s.GetBadHeads(),
		Unrescued: s.GetUnrescued(), Supers: s.GetSuperblocks(), AgeS: -1, Pace: s.GetBytesPerSecond()}
	if s.GetSegments() > 0 {
		v.Percent = float64(s.Segment) * 100 / float64(s.Segments)
	}
	if s.GetFinishedUnixNs() > 0 {
		v.AgeS = int64(time.Since(time.Unix(0, s.FinishedUnixNs)).Seconds())
	}
	return v
}

func (d *storeDetail) rows() [][]string {
	rows := [][]string{{"store", d.ID}, {"host", d.Host}}
	if d.Path != "" { // its host has answered
		rows = append(rows, []string{"on", d.Kind + " " + d.Path},
			[]string{"size", fmt.Sprintf("%s, %s for data", formatSize(d.Size), formatSize(d.Capacity))},
			[]string{"used", fmt.Sprintf("%s in segments, %s of data", formatSize(d.Used), formatSize(d.Live))})
	}
	rows = append(rows, [][]string{{"state", d.State}, {"copies", fmt.Sprintf("of %d volumes", d.CopiesLeft)}, {"incarnation", fmt.Sprintf("%d, opened %d times", d.Incarnation, d.Openings)}}...)
	if d.Note != "" {
		rows = append(rows, []string{"found", d.Note})
	}
	if d.Retired {
		rows = append(rows, []string{"retired", fmt.Sprintf("copies of %d volumes are left", d.CopiesLeft)})
	}
	if d.Path == "" {
		return rows
	}
	age := "never"
	if d.Scrub.AgeS >= 0 {
		age = fmt.Sprintf("%v ago", time.Duration(d.Scrub.AgeS)*time.Second)
	}
	if d.Scrub.Running {
		age += fmt.Sprintf("; one runs: %.0f %%, %s read", d.Scrub.Percent, formatSize(d.Scrub.ReadBytes))
	}
	rows = append(rows, []string{"verified", age}, []string{"bad blocks", strconv.Itoa(len(d.Bad))})
	for _, b := range d.Bad[:min(len(d.Bad), 20)] {
		rows = append(rows, []string{"", fmt.Sprintf("volume %d, chunk %d, layer %d, block %d", b.Volume, b.Chunk, b.Layer, b.Block)})
	}
	names := make([]string, 0, len(d.Volumes))
	for n := range d.Volumes {
		names = append(names, n)
	}
	slices.Sort(names)
	for _, n := range names {
		rows = append(rows, []string{"volume " + n, formatSize(d.Volumes[n])})
	}
	return rows
}

func storeShowCommand(c *cli) *cobra.Command {
	var out outputFlag
	cmd := &cobra.Command{
		Use: "show STORE", Short: "Show one store: its disk, what it holds, when it was verified", Args: cobra.ExactArgs(1),
		Long:    "Show one store. STORE is its id, or enough of its beginning.",
		Example: "  cairn store show 63978029",
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.with(cmd.Context(), cliWait, func(ctx context.Context, s *session) error {
				d, err := s.storeDetail(ctx, args[0])
				if err != nil {
					return err
				}
				return out.show(d, nil, d.rows())
			})
		},
	}
	out.register(cmd)
	return cmd
}

// scrub begins a pass and, if it is to, waits for its end.
func (s *session) scrub(ctx context.Context, name string, pace uint64, wait bool) (_ *storeDetail, err error) {
	st, err := s.findStore(ctx, name)
	if err != nil {
		return nil, err
	}
	err = hostDone(onHost(ctx, s, st.Host, func(ctx context.Context, h pb.HostControlClient) (*pb.HostReply, error) {
		return h.ScrubStore(ctx, &pb.ScrubStoreRequest{Store: st.Id, BytesPerSecond: pace})
	}))
	if err != nil || !wait {
		return nil, err
	}
	rep, err := s.askStore(ctx, st)
	if err != nil {
		return nil, err
	}
	b := newBar("verifying", int64(rep.Usage.GetUsedBytes()))
	defer func() { b.finish(err) }()
	t := time.NewTicker(storePoll)
	defer t.Stop()
	for read := uint64(0); ; {
		if rep, err = s.askStore(ctx, st); err != nil {
			return nil, err
		}
		if n := rep.Scrub.GetReadBytes(); n > read {
			b.add(int64(n - read))
			read = n
		}
		if strings.HasPrefix(rep.Usage.GetState(), "failed") {
			return nil, status.Errorf(status.IO, "store %x: %s", st.Id[:4], rep.Usage.GetState())
		}
		if !rep.Scrub.GetRunning() {
			return s.storeDetail(ctx, name)
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// verdict is the outcome of a pass that was waited for.
func (d *storeDetail) verdict() error {
	if n := len(d.Bad); n > 0 || d.Scrub.Unrescued > 0 {
		return status.Errorf(status.Corrupt, "store %s has %d blocks that cannot be read and %d records not written anew: their volumes' gateways repair them from other copies; `cairn store show %s` lists what is left",
			d.ID[:8], n, d.Scrub.Unrescued, d.ID[:8])
	}
	return nil
}

func (d *storeDetail) verified() string {
	return fmt.Sprintf("store %s: %d blocks verified, %s read, %d found bad, %d damaged records and %d superblocks written anew",
		d.ID[:8], d.Scrub.Verified, formatSize(d.Scrub.ReadBytes), d.Scrub.BadBlocks, d.Scrub.BadHeads, d.Scrub.Supers)
}

func storeScrubCommand(c *cli) *cobra.Command {
	var wait bool
	var pace string
	cmd := &cobra.Command{
		Use: "scrub STORE", Short: "Read and verify everything a store holds, in the background", Args: cobra.ExactArgs(1),
		Long: `Read and verify everything a store holds, in the background and at a pace that leaves
the disk to the guests. What is found bad is repaired: data from another replica by the
gateway of its volume, records and superblocks by the store itself. Stores do this by
themselves once a week. The command again changes the pace of a scrub that runs.`,
		Example: "  cairn store scrub 63978029\n  cairn store scrub 63978029 --pace 200M --wait",
		RunE: func(cmd *cobra.Command, args []string) error {
			n, err := parseSize(pace)
			if err != nil {
				return err
			}
			if n == 0 {
				return usagef("--pace %s: a scrub needs a pace", pace)
			}
			limit := cliWait
			if wait {
				limit = 7 * 24 * time.Hour
			}
			return c.with(cmd.Context(), limit, func(ctx context.Context, s *session) error {
				d, err := s.scrub(ctx, args[0], n, wait)
				if err != nil || d == nil {
					return err
				}
				fmt.Println(d.verified())
				return d.verdict()
			})
		},
	}
	cmd.Flags().BoolVar(&wait, "wait", false, "show progress and end with the scrub: status 1 if something is bad")
	cmd.Flags().StringVar(&pace, "pace", "32M", "bytes per second")
	return cmd
}

func storeVerifyCommand(c *cli) *cobra.Command {
	var out outputFlag
	cmd := &cobra.Command{
		Use: "verify STORE|PATH", Short: "Verify a running store as fast as its disk goes, or one that is not running", Args: cobra.ExactArgs(1),
		Long: `Verify a store. Given its id, the running store reads everything it holds as fast as
its disk goes; the guests notice. Given the path of a file or device whose host does not
run, it is read from here, as "cairn store dump" does. Status 1: it is damaged.

With -o json it prints what "cairn store show" or, of a path, "cairn store dump" does.`,
		Example: "  cairn store verify 63978029\n  cairn store verify /srv/cairn/store-1\n  cairn store verify 63978029 -o json | jq .badBlocks",
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := out.check(); err != nil {
				return err
			}
			if strings.ContainsRune(args[0], '/') {
				rep, err := inspectPath(args[0])
				if err != nil {
					return err
				}
				text := fmt.Sprintf("store %s: %d blocks of data and %d batches verified", rep.ID[:8], rep.BlocksVerified, rep.BatchesVerified)
				return cmp.Or(out.show(rep, nil, [][]string{{text}}), whole(args[0], rep))
			}
			return c.with(cmd.Context(), 24*time.Hour, func(ctx context.Context, s *session) error {
				d, err := s.scrub(ctx, args[0], 1<<40, true)
				if err != nil {
					return err
				}
				return cmp.Or(out.show(d, nil, [][]string{{d.verified()}}), d.verdict())
			})
		},
	}
	out.register(cmd)
	return cmd
}

func storeRetireCommand(c *cli) *cobra.Command {
	var undo bool
	cmd := &cobra.Command{
		Use: "retire STORE", Short: "Take a store out of service: its copies go elsewhere", Args: cobra.ExactArgs(1),
		Long: `Take a store out of service: it gets no new chunks, and the gateways move the copies
it has to other stores. Its disk may go when "cairn store show" says that no copies are
left. --undo puts it into service again.`,
		Example: "  cairn store retire 63978029\n  cairn store show 63978029",
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.with(cmd.Context(), cliWait, func(ctx context.Context, s *session) error {
				st, err := s.findStore(ctx, args[0])
				if err != nil {
					return err
				}
				if _, err := s.meta.Do(ctx, &pb.Command{Op: &pb.Command_RetireStore{RetireStore: &pb.RetireStore{Store: st.Id, Retired: !undo}}}); err != nil {
					return err
				}
				if undo {
					say("store %x is in service again", st.Id[:4])
					return nil
				}
				left, err := s.copiesOn(ctx, st.Id)
				if err != nil {
					return err
				}
				say("store %x gets nothing new; copies of %d volumes are to go elsewhere: `cairn store show %x` tells how many are left", st.Id[:4], left, st.Id[:4])
				return nil
			})
		},
	}
	cmd.Flags().BoolVar(&undo, "undo", false, "put it into service again")
	return cmd
}

func storeRemoveCommand(c *cli) *cobra.Command {
	return &cobra.Command{
		Use: "rm STORE", Short: "Forget a retired store whose disk is gone", Args: cobra.ExactArgs(1),
		Long: `Forget a store that is retired, has no copies any more, and whose host does not have it
open. A disk that comes back nevertheless joins as any new one does.`,
		Example: "  cairn store retire 63978029\n  cairn store rm 63978029",
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.with(cmd.Context(), cliWait, func(ctx context.Context, s *session) error {
				st, err := s.findStore(ctx, args[0])
				if err != nil {
					return err
				}
				if _, err := s.askStore(ctx, st); err == nil && st.Retired {
					return status.Errorf(status.Held, "host %s has store %x open, and would register it again: take it out of that host's configuration and start the host anew first", st.Host, st.Id[:4])
				}
				if _, err := s.meta.Do(ctx, &pb.Command{Op: &pb.Command_RemoveStore{RemoveStore: &pb.RemoveStore{Store: st.Id}}}); err != nil {
					return err
				}
				say("store %x is forgotten", st.Id[:4])
				return nil
			})
		},
	}
}

// copiesOn counts the volumes that have a store as a member.
func (s *session) copiesOn(ctx context.Context, id []byte) (n int, err error) {
	vols, err := s.meta.Query(ctx, &pb.QueryRequest{Q: &pb.QueryRequest_Volumes{Volumes: true}})
	if err != nil {
		return 0, err
	}
	for _, v := range vols.Volumes {
		if slices.ContainsFunc(v.Members, func(m *pb.Member) bool { return string(m.Store) == string(id) }) {
			n++
		}
	}
	return n, nil
}

// inspectPath reads a store nobody has open.
func inspectPath(path string) (rep *store.Report, err error) {
	d, err := disk.OpenReadOnly(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, status.Errorf(status.NotFound, "there is no file or device %s", path)
	}
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	var b *bar
	last := 0
	rep, err = store.Inspect(d, func(done, of int) {
		if b == nil {
			b = newBar("reading segments", int64(of)<<20)
		}
		b.add(int64(done-last) << 20)
		last = done
	})
	if b != nil {
		b.finish(err)
	}
	return rep, err
}

func whole(path string, rep *store.Report) error {
	if len(rep.Damage) == 0 {
		return nil
	}
	return status.Errorf(status.Corrupt, "%s: %d damages, the first: %s", path, len(rep.Damage), rep.Damage[0])
}

func storeDumpCommand() *cobra.Command {
	var out outputFlag
	cmd := &cobra.Command{
		Use: "dump PATH", Short: "Explain a store that is not running, and prove its integrity or list the damage", Args: cobra.ExactArgs(1),
		Long: `Read a store's file or device, whose host must not run, and explain it: superblock,
log, segments, records and what the index holds. Every checksum of what is in use is
verified; nothing is written. Status 1: it is damaged, and the list says where.`,
		Example: "  cairn store dump /srv/cairn/host-1/store-1\n  cairn store dump /dev/sdb -o json",
		RunE: func(_ *cobra.Command, args []string) error {
			rep, err := inspectPath(args[0])
			if err != nil && (rep == nil || rep.ID == ids.StoreID{}.String() || rep.ID == "") {
				return err
			}
			if err != nil {
				rep.Damage = append(rep.Damage, err.Error())
			}
			if out.format == "table" {
				err = dumpText(rep)
			} else {
				err = out.show(rep, nil, nil)
			}
			if err != nil {
				return err
			}
			return whole(args[0], rep)
		},
	}
	out.register(cmd)
	return cmd
}

// dumpText explains a report to a person.
func dumpText(r *store.Report) error {
	end := "was not closed: killed, out of power, or running"
	if r.Clean {
		end = "was closed in order"
	}
	if err := printTable(nil, [][]string{{"store", r.ID}, {"cluster", dash(r.Cluster)}, {"format", fmt.Sprintf("version %d, %s in segments of %s", r.FormatVersion, formatSize(uint64(r.SizeBytes)), formatSize(uint64(r.SegmentBytes)))},
		{"superblocks", strings.Join(r.Superblocks, " · ")}, {"incarnation", fmt.Sprintf("%d, opened %d times", r.Incarnation, r.Life)},
		{"end", fmt.Sprintf("it %s, under boot %s", end, dash(r.BootID))}, {"log", fmt.Sprintf("up to LSN %d; whole up to %d for sure", r.LastLSN, r.DurableLSN)},
		{"checkpoints", fmt.Sprintf("%d named in the log", len(r.Checkpoints))},
		{"segments", fmt.Sprintf("%d in use, %d free (%d of these not empty)", len(r.Segments), r.FreeSegments, r.StaleSegments)},
		{"remembered", fmt.Sprintf("%d drops, %d gaps reported before", r.Drops, r.KnownGaps)},
		{"verified", fmt.Sprintf("%d batches, %d blocks of data", r.BatchesVerified, r.BlocksVerified)}}); err != nil {
		return err
	}
	fmt.Println()
	var rows [][]string
	for _, g := range r.Segments {
		var kinds []string
		for k, n := range g.Records {
			kinds = append(kinds, fmt.Sprintf("%s %d", k, n))
		}
		slices.Sort(kinds)
		rows = append(rows, []string{fmt.Sprint(g.Number), fmt.Sprintf("%d-%d", g.Gen, g.Last), fmt.Sprint(g.Life), fmt.Sprint(g.Used), fmt.Sprint(g.Live), fmt.Sprint(g.Marks), fmt.Sprint(g.Batches), strings.Join(kinds, ", ")})
	}
	if err := printTable([]string{"SEGMENT", "LSNS", "LIFE", "USED", "LIVE", "TOMBSTONES", "BATCHES", "RECORDS"}, rows); err != nil {
		return err
	}
	fmt.Println()
	rows = nil
	for _, v := range r.Volumes {
		rows = append(rows, []string{fmt.Sprint(v.ID), fmt.Sprint(v.Epoch), v.Floor, v.High, strconv.FormatBool(v.Intact), formatSize(v.Live * ids.BlockSize), fmt.Sprint(len(v.Chunks))})
	}
	if err := printTable([]string{"VOLUME", "EPOCH", "FLOOR", "HIGHEST", "INTACT", "LIVE", "CHUNKS"}, rows); err != nil {
		return err
	}
	fmt.Println()
	if len(r.Damage) == 0 {
		fmt.Println("whole: every checksum of what is in use is right")
	}
	for _, d := range r.Damage {
		fmt.Println("! " + d)
	}
	return nil
}
