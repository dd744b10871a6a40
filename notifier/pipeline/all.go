package pipeline

// stages are what a sink's transformers may name.
var stages = []kindOfStage{
	{"accumulator", true, readAccumulator},
	{"aggregator", true, readAggregator},
	{"arithmetic", true, readArithmetic},
	{"delta", true, readDelta},
	{"rate_of_change", true, readRate},
	{"unit_conversion", false, readUnitConversion},
}
