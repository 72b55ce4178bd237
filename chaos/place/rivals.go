package place

import (
	"math/rand/v2"
	"slices"

	"github.com/cairnstore/cairn/placement"
)

// Rival is a naive policy that the production's are compared with.
type Rival string

// The rivals. All pass the same filters.
const (
	Random      Rival = "random"           // any host that fits
	VMOnly      Rival = "VMs only"         // most headroom, wherever the data is
	DataFollows Rival = "data follows VMs" // the same, and all data is then moved there
)

// Rivals are all rivals.
var Rivals = []Rival{Random, VMOnly, DataFollows}

type rival struct {
	kind  Rival
	r     *replay
	rng   *rand.Rand
	sched *placement.Scheduler
}

func newRival(k Rival, r *replay) *rival {
	return &rival{kind: k, r: r, rng: rand.New(rand.NewPCG(r.cfg.Seed, 7)), sched: placement.NewScheduler(r.fleet, placement.WorstFit, r.cfg.Sample, r.cfg.Seed)}
}

// tries of a random draw before every host is looked at.
const randomTries = 200

func (v *rival) place(m *vm) int {
	if v.kind == Random {
		n := len(v.r.t.Hosts)
		for range randomTries {
			if h := v.rng.IntN(n); v.r.fleet.Bind(m.job, h) == nil {
				return h
			}
		}
		for i, first := 0, v.rng.IntN(n); i < n; i++ {
			if h := (first + i) % n; v.r.fleet.Bind(m.job, h) == nil {
				return h
			}
		}
		return -1
	}
	gains := m.job.Gains
	m.job.Gains = nil
	d, _, err := v.sched.Place(m.job)
	m.job.Gains = gains
	if err != nil {
		return -1
	}
	if v.kind == DataFollows {
		for i, data := range m.data {
			if slices.Contains(data.Hosts, d.Host) {
				continue
			}
			v.r.res.DataMoved += float64(data.Bytes)
			m.data[i].Hosts = append([]int{d.Host}, data.Hosts[1:]...)
		}
		m.gains()
	}
	return d.Host
}
