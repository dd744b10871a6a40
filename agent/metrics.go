package agent

import (
	"runtime"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/collectors"
	"github.com/kvmeter/kvmeter/sample"
)

// metrics are what the agent tells of itself.
type metrics struct {
	domains     prometheus.Gauge
	held        *prometheus.CounterVec // meter
	skipped     prometheus.Counter
	libvirt     prometheus.Gauge
	silent      *prometheus.GaugeVec   // domain
	duration    *prometheus.GaugeVec   // collector
	success     *prometheus.GaugeVec   // collector
	failures    *prometheus.CounterVec // collector
	cpu         *prometheus.CounterVec // collector
	spent       atomic.Int64           // CPU time of all collectors, ns
	differs     *prometheus.GaugeVec   // meter
	comparisons *prometheus.CounterVec // meter, verdict

	hookOn, hookEntries, hookMaxEntries              *prometheus.GaugeVec   // hook
	hookEvents, hookMisses, hookDropped, hookOrphans *prometheus.CounterVec // hook

	retries, idle, lostVCPUs prometheus.Counter
	readers                  map[string]bpf.Stats // by origin, as last counted

	execLatency                 prometheus.Histogram
	ends, endsUnseen, strangers prometheus.Counter
	noDomains                   prometheus.Counter
	life                        bpf.LifeStats // as last counted
	lifeMisses                  prometheus.Counter
	lifeDropped                 *prometheus.CounterVec // what
	lifeFollowed, lifeRoom      prometheus.Gauge

	heldUsage [usageCount]prometheus.Counter
	heldNIC   [nicCount]prometheus.Counter
}

func newMetrics(reg prometheus.Registerer) (*metrics, error) {
	const namespace, subsystem = "kvmeter", "agent"
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Namespace: namespace, Subsystem: subsystem, Name: name, Help: help})
	}
	gauge := func(name, help string) prometheus.Gauge {
		return prometheus.NewGauge(prometheus.GaugeOpts{Namespace: namespace, Subsystem: subsystem, Name: name, Help: help})
	}
	counters := func(name, help, label string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: namespace, Subsystem: subsystem, Name: name, Help: help}, []string{label})
	}
	gauges := func(name, help, label string) *prometheus.GaugeVec {
		return prometheus.NewGaugeVec(prometheus.GaugeOpts{Namespace: namespace, Subsystem: subsystem, Name: name, Help: help}, []string{label})
	}
	m := &metrics{
		readers:        map[string]bpf.Stats{},
		domains:        gauge("domains", "Domains that are metered."),
		held:           counters("held_values_total", "Readings that were lower than the one before, which was published instead.", "meter"),
		skipped:        counter("skipped_polls_total", "Polls that were left out because the one before was not done."),
		libvirt:        gauge("libvirt_connected", "1 while libvirt answers; of several, while one does."),
		silent:         gauges("qemu_silent_seconds", "How long ago the QEMU of a domain has answered that did not when it was asked last.", "domain"),
		duration:       gauges("collector_duration_seconds", "How long the collector's last run took.", "collector"),
		success:        gauges("collector_success", "1 if the collector's last run succeeded.", "collector"),
		failures:       counters("collector_failures_total", "Failed runs of the collector.", "collector"),
		cpu:            counters("collector_cpu_seconds_total", "CPU time of the thread that ran the collector.", "collector"),
		hookOn:         gauges("hook_attached", "1 while the hook is attached.", "hook"),
		hookEntries:    gauges("hook_map_entries", "Entries of the fullest map of the hook's programs.", "hook"),
		hookMaxEntries: gauges("hook_map_max_entries", "Entries that fit into that map.", "hook"),
		hookEvents:     counters("hook_events_total", "What the hook counted and the kernel keeps a total of: bytes (disk), packets (tcx), switches (runqueue), exits (exits).", "hook"),
		hookMisses:     counters("hook_misses_total", "Runs of the hook's programs that the kernel skipped.", "hook"),
		hookDropped:    counters("hook_dropped_total", "Events that the hook could not count because a map was full.", "hook"),
		hookOrphans:    counters("hook_orphans_total", "Events of which the hook saw only the beginning or the end.", "hook"),
		ends:           counter("ends_total", "Domains that were accounted at their end."),
		endsUnseen:     counter("ends_unseen_total", "Domains whose end no hook saw; what they used last is a gap."),
		strangers:      counter("ends_unidentified_total", "QEMU processes that ended before it could be told whose they were, which is a gap."),
		noDomains:      counter("life_no_domains_total", "QEMU processes that turned out to run no guest, and are not followed."),
		lifeMisses:     counter("life_misses_total", "Runs of the hooks at exec and end that the kernel skipped."),
		lifeDropped:    counters("life_dropped_total", "What the hooks at exec and end had no room for: processes, commands (their command lines), ends (their wake-ups) and holds (of tasks that outlive a skipped hook).", "what"),
		lifeFollowed:   gauge("life_followed", "Processes that the hook at their end follows."),
		lifeRoom:       gauge("life_room", "Processes that it can follow."),
		retries:        counter("reader_retries_total", "Processes read again because a thread had exited meanwhile."),
		idle:           counter("reader_idle_total", "Processes of which no thread had run since the read before."),
		lostVCPUs:      counter("reader_lost_vcpus_total", "vCPUs that were counted only in their domain's sums, for lack of room."),
		differs:        gauges("crosscheck_differs", "Counters that libvirt counted otherwise, by more than the tolerance, when they were last compared.", "meter"),
		comparisons: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: namespace, Subsystem: subsystem, Name: "crosscheck_comparisons_total",
			Help: "Comparisons with libvirt, by what came of them.",
		}, []string{"meter", "verdict"}),
	}
	m.execLatency = prometheus.NewHistogram(prometheus.HistogramOpts{
		Namespace: namespace, Subsystem: subsystem, Name: "exec_latency_seconds",
		Help:    "From the exec of a domain's QEMU to when the agent knew it.",
		Buckets: prometheus.ExponentialBuckets(1e-4, 2, 14),
	})
	for i, meter := range usageMeters {
		m.heldUsage[i] = m.held.WithLabelValues(meter.Name)
	}
	for i, meter := range nicMeters {
		m.heldNIC[i] = m.held.WithLabelValues(meter.Name)
	}
	for _, c := range sample.Checks {
		m.differs.WithLabelValues(c.Of.Name)
		for _, v := range verdicts {
			m.comparisons.WithLabelValues(c.Of.Name, v)
		}
	}
	for _, c := range []prometheus.Collector{
		m.domains, m.held, m.skipped, m.libvirt, m.silent, m.duration, m.success, m.failures, m.differs, m.comparisons, m.retries, m.idle, m.lostVCPUs,
		m.cpu, m.hookOn, m.hookEntries, m.hookMaxEntries, m.hookEvents, m.hookMisses, m.hookDropped, m.hookOrphans,
		m.execLatency, m.noDomains, m.ends, m.endsUnseen, m.strangers, m.lifeMisses, m.lifeDropped, m.lifeFollowed, m.lifeRoom,
	} {
		if err := reg.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// verdicts are the names of [sample.Agrees] and so on.
var verdicts = [...]string{sample.Agrees: "agrees", sample.Differs: "differs", sample.NotComparable: "not comparable"}

// countCheck counts a comparison.
func (m *metrics) countCheck(c *comparison) {
	m.comparisons.WithLabelValues(c.check.Of.Name, verdicts[c.verdict]).Inc()
}

// differ adds those of the comparisons that differ, each as by.
func (m *metrics) differ(all []comparison, by float64) {
	for i := range all {
		if all[i].alarm {
			m.differs.WithLabelValues(all[i].check.Of.Name).Add(by)
		}
	}
}

// heldCPU counts a held value of a process, by index into usageMeters.
func (m *metrics) heldCPU(i int) {
	m.heldUsage[i].Inc()
}

// countReader adds what the reader of that origin has counted since the last call.
func (m *metrics) countReader(origin string, s bpf.Stats) {
	last := m.readers[origin]
	m.retries.Add(float64(s.Retries - last.Retries))
	m.idle.Add(float64(s.Idle - last.Idle))
	m.lostVCPUs.Add(float64(s.LostVCPUs - last.LostVCPUs))
	m.readers[origin] = s
}

// countLife adds what the hooks at exec and end have met since the last call.
// Pinned ones had met some of it before this agent was started.
func (m *metrics) countLife(s bpf.LifeStats) {
	m.lifeMisses.Add(float64(s.Misses - m.life.Misses))
	m.lifeDropped.WithLabelValues("processes").Add(float64(s.NotFollowed - m.life.NotFollowed))
	m.lifeDropped.WithLabelValues("commands").Add(float64(s.ExecsLost - m.life.ExecsLost))
	m.lifeDropped.WithLabelValues("ends").Add(float64(s.EndsLost - m.life.EndsLost))
	m.lifeDropped.WithLabelValues("holds").Add(float64(s.NotHeld - m.life.NotHeld))
	m.lifeFollowed.Set(float64(s.Followed))
	m.lifeRoom.Set(float64(s.Room))
	m.life = s
}

// run is one collector's part of the metrics.
type run struct {
	duration, success prometheus.Gauge
	failures, cpu     prometheus.Counter
	spent             *atomic.Int64 // by all collectors, ns
}

func (m *metrics) collector(name string) run {
	return run{
		m.duration.WithLabelValues(name), m.success.WithLabelValues(name),
		m.failures.WithLabelValues(name), m.cpu.WithLabelValues(name), &m.spent,
	}
}

// began is when a run began: the time, and the CPU time of the thread.
type began struct {
	at  time.Time
	cpu time.Duration
}

// begin keeps the goroutine in its thread until done is called.
func (r *run) begin() began {
	runtime.LockOSThread()
	return began{time.Now(), threadCPU()}
}

func (r *run) done(b began, err error) {
	defer runtime.UnlockOSThread()
	r.duration.Set(time.Since(b.at).Seconds())
	cpu := threadCPU() - b.cpu
	r.cpu.Add(cpu.Seconds())
	r.spent.Add(int64(cpu))
	if err == nil {
		r.success.Set(1)
		return
	}
	r.success.Set(0)
	r.failures.Inc()
}

// threadCPU returns the CPU time of the calling thread.
func threadCPU() time.Duration {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t); err != nil {
		return 0 // never on Linux
	}
	return time.Duration(t.Nano())
}

// hookMetrics are one hook's part of the metrics.
type hookMetrics struct {
	attached, entries, maxEntries    prometheus.Gauge
	events, misses, dropped, orphans prometheus.Counter
	last                             collectors.HookStats
}

func (m *metrics) hook(name string) hookMetrics {
	return hookMetrics{
		attached: m.hookOn.WithLabelValues(name), entries: m.hookEntries.WithLabelValues(name), maxEntries: m.hookMaxEntries.WithLabelValues(name),
		events: m.hookEvents.WithLabelValues(name), misses: m.hookMisses.WithLabelValues(name),
		dropped: m.hookDropped.WithLabelValues(name), orphans: m.hookOrphans.WithLabelValues(name),
	}
}

// count takes over what the hook has met.
func (m *hookMetrics) count(s collectors.HookStats) {
	m.misses.Add(float64(s.Misses - m.last.Misses))
	m.dropped.Add(float64(s.Dropped - m.last.Dropped))
	m.orphans.Add(float64(s.Orphans - m.last.Orphans))
	m.entries.Set(float64(s.Entries))
	m.maxEntries.Set(float64(s.MaxEntries))
	m.last = s
}
